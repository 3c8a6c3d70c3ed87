"""`IGSP`: the options of the mode. Choices that the paper's abstract leaves open are options or constants of ours.

Source: iGSP (arXiv 2605.19301), of which only the abstract could be read (2026-11); it gives no formula and no
constant. Structure of the experts after MoE-Adapters4CL (Yu et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import OptionError
from ..options import check_choice, check_number

ALL_LINEAR = "all-linear"
CHOICES = {
    "kind": ("lora", "bottleneck"),
    "gate_scale": ("none", "width"),
    "router": ("per-task", "shared"),
    "regularization": ("mass", "geom", "function", "both", "none"),
    "price": ("graded", "flat"),
    "on_cap": ("keep", "prune"),
    "orthogonal": ("input", "both", "structural", "none"),
    "router_after": ("frozen", "train"),
}
WHOLE = {"rank": 1, "candidates": 1, "top_k": 1, "steps": 1, "window": 1, "cap": 1, "seed": 0}
UNSET = ("rank", "steps", "window", "cap")  # may be None
SHARE = 5  # phase 1 takes at most this part of a task
FIRST = 20  # steps of the first phase 1 where nothing says how long a task is


class Plan(NamedTuple):
    """Steps of one task: the most that phase 1 takes, its warm-up, and a window of the test of convergence."""

    cap: int
    warm: int
    window: int


def check_target_modules(value: object) -> None:
    """Refuse what selects no modules in PEFT.

    Raises:
        OptionError: neither a list of names nor a regular expression; a glob pattern is told the way out.
    """
    names = [value] if isinstance(value, str) else value if isinstance(value, (tuple, list)) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise OptionError(
            f"IGSP(target_modules={value!r}): expected a list of module names, a regular expression or '{ALL_LINEAR}'"
        )
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            way = f"; for a glob pattern give a list, [{value[2:]!r}]" if value.startswith("*.") else ""
            raise OptionError(f"IGSP(target_modules={value!r}): no regular expression ({error}){way}") from error


@dataclass(frozen=True)
class IGSP:
    """Options of ``mode=IGSP(...)``; ``mode="igsp"`` takes the defaults.

    Experts
        * `target_modules`: as in PEFT a list of names (a module whose name is one of them or ends with one after a
          dot), a regular expression that whole names match, or ``"all-linear"``. Experts stand parallel to each of
          these modules, linear layers or blocks of them, and read its input. ``["mlp"]`` is the MLP of every block.
        * `kind`: ``"lora"`` (`B A x`) or ``"bottleneck"`` (`B relu(A x + a) + b`, MoE-Adapters).
        * `rank`: rows of `A`, 16 (64 for a bottleneck). `scale`: factor on every expert's output.
        * `candidates`: experts added to each layer for each task (fewer where fewer free directions are left). With one
          the first task has nothing to choose and goes to phase 2 after a step.

    Routing
        * `top_k`: experts a sample may use in one layer. `noise`: standard deviation of the noise on the logits in
          phase 1 (0.7 is the initial value of MoE-Adapters' learned one).
        * `gate_scale` of the router's input, the mean of a sample's tokens: ``"none"`` as in MoE-Adapters (a step of
          Adam moves a logit by about `d` times the rate), or ``"width"``, divided by `sqrt(d)`: slower routing, in
          which candidates share the samples for long.
        * `router`: ``"per-task"``; where no task is named, the backbone tells the task of each sample, or none (see
          `moe.recognition`). Or one ``"shared"`` router for all tasks, whose logits stay what they were on the share
          `shared_energy` of what it saw in finished tasks (0: it drifts).
    Phase 1, subspace identification
        * `steps` of a task, if they are known. `cap`: most steps of phase 1; if None a fifth of `steps`, else of the
          steps that the task before took, else 20.
        * `warmup`: first steps, in which routers stay and noise alone spreads the samples, so that candidates have
          learned something before they are judged; a tenth of the cap if None.
        * `regularization`: ``"mass"`` (share of routing that goes to candidates), ``"geom"`` (share of a candidate's
          `B A` outside the historical output space), ``"function"`` (share of a candidate's outputs for the batch
          outside the span of what historical experts put out in their tasks), ``"both"`` (the first two) or
          ``"none"``; `strength` is its factor. `price` of the
          `j`-th of `m` candidates in ``"mass"``: ``"graded"``, `j / m`, so that one is filled before the next, or
          ``"flat"``, 1.
        * `threshold`: experts with less routing are pruned; if None, half of an equal share (see
          `pruning.keep_above`).
        * Convergence, in windows of `window` steps (a tenth of the cap if None): Jaccard index of top-k sets at least
          .95 and KL divergence of mean probabilities below .001 plus what two windows of other samples differ
          by anyway, `(E - 1) / n` (see `convergence.chance_divergence`), 2 windows in a row. At the cap layers that
          have not converged are pruned all the same (``on_cap="prune"``) or ``"keep"`` all experts.

    Phase 2, orthogonal subspace fine-tuning
        * `orthogonal`: which changes of a surviving expert stay orthogonal to the historical subspace: rows of `A`
          (``"input"``), also columns of `B` (``"both"``), ``"structural"`` (`A` frozen, `B` trained), ``"none"``.
        * `router_after`: routers of layers with survivors are ``"frozen"`` or ``"train"``. A layer without survivors
          trains its router in any case.

    Optimization: `lr` of the experts' parameter group, 100 x the first group's if None. `seed` of initial values and
    routing noise.

    Raises:
        OptionError: names the option, the value found and what is allowed.
    """

    target_modules: str | Sequence[str] = ("mlp",)
    kind: Literal["lora", "bottleneck"] = "lora"
    rank: int | None = None
    scale: float = 1.0
    candidates: int = 1
    top_k: int = 2
    noise: float = 0.7
    gate_scale: Literal["none", "width"] = "none"
    router: Literal["per-task", "shared"] = "per-task"
    shared_energy: float = 0.99
    regularization: Literal["mass", "geom", "function", "both", "none"] = "mass"
    price: Literal["graded", "flat"] = "graded"
    strength: float = 0.1
    steps: int | None = None
    cap: int | None = None
    warmup: int | None = None
    threshold: float | None = None
    window: int | None = None
    on_cap: Literal["keep", "prune"] = "prune"
    orthogonal: Literal["input", "both", "structural", "none"] = "input"
    router_after: Literal["frozen", "train"] = "frozen"
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_target_modules(self.target_modules)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed, owner="IGSP")
        for name, least in WHOLE.items():
            value = getattr(self, name)
            if not (value is None and name in UNSET) and (type(value) is not int or value < least):
                raise OptionError(f"IGSP({name}={value!r}): expected a whole number of at least {least}")
        for name, low, high, closed in (
            ("scale", 0.0, 1e6, ""),
            ("noise", 0.0, 100.0, "low"),
            ("strength", 0.0, 1e6, "low"),
            ("shared_energy", 0.0, 1.0, "low high"),
        ):
            check_number(self, name, getattr(self, name), low, high, closed=closed)
        for name in ("threshold", "lr"):
            if getattr(self, name) is not None:
                check_number(self, name, getattr(self, name), 0.0, 1.0)
        cap = self.plan(None).cap
        if self.warmup is not None and (type(self.warmup) is not int or not 0 <= self.warmup < cap):
            raise OptionError(f"IGSP(warmup={self.warmup!r}, cap={cap}): expected a whole number below cap, or None")

    @property
    def width(self) -> int:
        """Rows of an expert's `A`."""
        if self.rank is not None:
            return self.rank
        return 16 if self.kind == "lora" else 64

    def plan(self, before: int | None) -> Plan:
        """Return the steps of a task's parts; the task before it took `before` steps (None: there was none)."""
        known = self.steps or before
        cap = self.cap or (max(1, known // SHARE) if known else FIRST)
        tenth = -(-cap // 10)
        return Plan(cap, tenth if self.warmup is None else self.warmup, self.window or tenth)

    @property
    def structure(self) -> dict[str, object]:
        """Choices that experts in a file must agree with; `gate`, the mean of a sample's tokens, was an option once."""
        names = ("kind", "router", "gate_scale", "scale")
        return {**{name: getattr(self, name) for name in names}, "gate": "mean", "rank": self.width}
