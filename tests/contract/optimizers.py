"""Every optimizer of the installed libraries, wrapped: which hold, which are refused and why, which run at all.

    python -m tests.contract.optimizers [--libraries torch,timm] [--steps 200] [--page docs/lab/optimizers.md]

A network `[d] -> [d] -> [8]` (`d` = 32; 64 where an optimizer quantizes only larger tensors; 16 for two slow ones)
consolidates `d / 4` rows of an old task exactly, then learns another one of 32 rows. `drift` is the largest relative
change of the old outputs, with the weights of training and, where an optimizer has them, with the averaged weights.
Each optimizer also runs alone: that shows that it runs here, that it moves the
weights, and how far the old outputs drift without protection. `resume` saves in the middle and goes on in a new
optimizer: "bitwise", "holds" (protected, but the optimizer's own state does not carry everything) or "not alone either"
(its own state dict does not load with `weights_only=True`, with or without this library). `loss` is the new task's,
before and after: protection is not progress.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nullspace_optim import NullSpaceError, NullSpaceOptimizer, NumericalRank
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from tests.contract.installed_optimizers import LIBRARIES, Candidate, candidates

LIMIT = 1e-5
FARTHEST = 100.0  # times the loss at the start: more is divergence
WARM, NEW_ROWS = 2, 32


@dataclass(frozen=True)
class Result:
    """What became of one optimizer: a verdict, drifts (relative), losses of the new task, and a reason."""

    candidate: Candidate
    verdict: str
    reason: str = ""
    unprotected: float = float("nan")
    drift: float = float("nan")
    losses: tuple[float, float] = (float("nan"), float("nan"))
    resume: str = ""


class Run:
    """One model, its data and one optimizer (wrapped or alone)."""

    def __init__(self, candidate: Candidate, wrapped: bool) -> None:
        torch.manual_seed(0)
        self.candidate = candidate
        width = candidate.width
        self.model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))
        self.old = torch.randn(width // 4, width)
        self.inputs, self.targets = torch.randn(NEW_ROWS, width), torch.randn(NEW_ROWS, 8)
        self.base: Any = candidate.build(self.model)
        self.optimizer: Any = (
            NullSpaceOptimizer(self.base, self.model, policy=NumericalRank()) if wrapped else self.base
        )

    def loss(self) -> Tensor:
        """The new task's loss on all of its rows."""
        value: Tensor = (self.model(self.inputs) - self.targets).square().mean()
        return value

    def outputs(self) -> Tensor:
        """The old task's outputs in double precision."""
        with torch.no_grad():
            result: Tensor = self.model(self.old).double()
        return result

    def evaluate(self) -> Tensor:
        """Compute loss and gradients anew."""
        self.optimizer.zero_grad()
        value = self.loss()
        if self.candidate.how == "own backward":
            self.base.backward(value)
        else:
            value.backward(create_graph=self.candidate.how == "second order")  # type: ignore[no-untyped-call]
        return value

    def train(self, steps: int) -> None:
        """Take so many full-batch steps in training mode."""
        torch.manual_seed(1)  # some optimizers draw random numbers
        getattr(self.optimizer, "train", lambda: None)()
        for _ in range(steps):
            value = self.evaluate()
            if self.candidate.how == "own closure":
                self.base.set_closure(nn.functional.mse_loss, self.inputs, self.targets)
            if self.candidate.how == "closure":
                self.optimizer.step(self.evaluate)
            elif self.candidate.how == "loss":
                self.optimizer.step(lambda value=value: value.detach())  # type: ignore[misc]
            else:
                self.optimizer.step()

    def averaged(self) -> Iterator[None]:
        """Step through the weights that the optimizer may put in the place of the trained ones."""
        yield
        for there, back in (("eval", "train"), ("backup_and_load_cache", "clear_and_load_backup")):
            if callable(getattr(self.base, there, None)):
                getattr(self.base, there)()
                yield
                getattr(self.base, back)()

    def drift(self, outputs: Tensor) -> float:
        """The largest relative drift of the old outputs over every set of weights."""
        return max(float((self.outputs() - outputs).norm() / outputs.norm()) for _ in self.averaged())


def measure(candidate: Candidate, steps: int) -> Result:
    """Run one optimizer alone and wrapped; never raises."""
    try:
        alone = Run(candidate, wrapped=False)
        outputs = alone.outputs()
        alone.train(WARM + steps)
        unprotected = alone.drift(outputs)
    except NotImplementedError as error:
        return _refusal(candidate) or Result(candidate, "does not run", _line(error))
    except Exception as error:
        return _refusal(candidate) or Result(candidate, "does not run", f"{type(error).__name__}: {_line(error)}")
    if unprotected == 0.0:
        return Result(candidate, "idle", "moves no weight of this network on its own either")
    try:
        return replace(_protected(candidate, steps), unprotected=unprotected)
    except NullSpaceError as error:
        return Result(candidate, "refused", _line(error), unprotected)
    except Exception as error:
        return Result(candidate, "fails", f"{type(error).__name__}: {_line(error)}", unprotected)


def _refusal(candidate: Candidate) -> Result | None:
    """The refusal of an optimizer that cannot run here, if it would be refused anyway."""
    try:
        Run(candidate, wrapped=True)
    except NullSpaceError as error:
        return Result(candidate, "refused", _line(error))
    except Exception:
        return None
    return None


def _protected(candidate: Candidate, steps: int) -> Result:
    run = Run(candidate, wrapped=True)
    run.train(WARM)
    run.optimizer.consolidate([run.old], progress=False)
    outputs = next(_evaluation_outputs(run))
    frozen = {n: b.kept.clone() for n, b in run.optimizer.bases.items() if b.kept is not None}
    before, start = copy.deepcopy(run.model.state_dict()), run.loss().item()
    run.train(steps)
    drift = max(run.drift(outputs), run.optimizer.verify().worst)
    resume = _resume(run, outputs)
    losses = (start, run.loss().item())
    moved = any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    held = drift <= LIMIT and all(torch.equal(run.model.get_parameter(n), kept) for n, kept in frozen.items())
    diverged = not losses[1] <= FARTHEST * start
    verdict = "diverges" if diverged else "leaks" if not held else "does not learn" if not moved else "holds"
    if verdict == "holds" and resume.startswith("fails"):
        verdict = "fails"
    return Result(candidate, verdict, candidate.note, drift=drift, losses=losses, resume=resume)


def _evaluation_outputs(run: Run) -> Iterator[Tensor]:
    """The old outputs with the weights that are evaluated: what a consolidation measures."""
    states = [run.outputs() for _ in run.averaged()]
    yield states[1] if callable(getattr(run.base, "eval", None)) else states[0]


def _resume(run: Run, outputs: Tensor) -> str:
    """Save, load into a new model and optimizer, take two steps in both."""
    twin = Run(run.candidate, wrapped=True)
    try:
        model, state = _through_a_file((run.model.state_dict(), run.optimizer.state_dict()))
        twin.model.load_state_dict(model)
        twin.optimizer.load_state_dict(state)
        twin.train(2)
    except Exception as error:
        if _resumes_alone(run.candidate):
            return f"fails: {_line(error)}"
        return "not alone either"  # its own state dict does not load, or only as an unrestricted pickle
    run.train(2)
    same = all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.model.parameters()))
    if max(twin.drift(outputs), twin.optimizer.verify().worst) > LIMIT:
        return "fails: leaks after loading"
    return "bitwise" if same else "holds"


def _resumes_alone(candidate: Candidate) -> bool:
    try:
        run, twin = Run(candidate, wrapped=False), Run(candidate, wrapped=False)
        run.train(2)
        twin.optimizer.load_state_dict(_through_a_file(run.optimizer.state_dict()))
        twin.train(2)
    except Exception:
        return False
    return True


def _through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:220]


def tables(results: Sequence[Result]) -> list[Table]:
    """One table a library."""
    made = []
    for library in dict.fromkeys(result.candidate.library for result in results):
        mine = [result for result in results if result.candidate.library == library]
        counts = ", ".join(
            f"{sum(r.verdict == verdict for r in mine)} {verdict}" for verdict in dict.fromkeys(r.verdict for r in mine)
        )
        rows = tuple(
            (
                f"`{r.candidate.name}`",
                r.verdict,
                _figure(r.drift),
                _figure(r.unprotected),
                _losses(r),
                r.resume,
                r.reason,
            )
            for r in mine
        )
        header = ("optimizer", "verdict", "drift", "unprotected", "loss", "resume", "remark")
        made.append(Table(f"{library} {version(library)}: {counts}", header, rows))
    return made


def _losses(result: Result) -> str:
    first, last = result.losses
    return "" if first != first else f"{first:.3g} → {last:.3g}"


def _figure(value: float) -> str:
    return "" if value != value else f"{value:.0e}"


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--libraries", default=",".join(LIBRARIES), help="comma-separated; those not installed are skipped"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps after the consolidation")
    parser.add_argument("--page", default="", help="write the result as this Markdown page")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    results = []
    torch.compiler.set_stance("force_eager")  # some libraries compile each update: minutes, and no other numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for candidate in candidates(options.libraries.split(",")):
            results.append(measure(candidate, options.steps))
            progress(f"{candidate.library} {candidate.name}: {results[-1].verdict} {results[-1].reason}")
    given = ["--steps", str(options.steps), "--page", options.page]
    device = torch.device("cpu")
    outcome = finish("tests.contract.optimizers", given, device, started, tables(results), output="")
    if options.page:
        Path(options.page).write_text(page(outcome), encoding="utf-8")
    return outcome


def page(outcome: Outcome) -> str:
    """The documentation page."""
    text = (__doc__ or "").split("\n\n", 2)[2].strip()
    return f"""# Which optimizers hold

{text}

* **holds**: drift at most {LIMIT:.0e} (float32), frozen parameters bit for bit, and the free directions were trained.
* **refused**: `NullSpaceOptimizer(base)` raises an error that says why.
* **diverges**: the loss ends a hundredfold above its start or is not finite; nothing is claimed of drifts.
* **does not run**: fails alone, without this library, with the remark; nothing is claimed.
* **idle**: alone, it moves none of these weights.

{outcome.markdown().replace("## optimizers", "## Results")}
"""


if __name__ == "__main__":
    main()
