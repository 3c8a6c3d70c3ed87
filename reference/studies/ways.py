"""Ways to fine-tune that the studies of kept against learned compare, and what these studies share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import yaml
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nullspace_optim import Energy, NullSpaceOptimizer
from nullspace_optim.policies import Spectrum
from reference.benchmarks.outcome import saved_bytes


@dataclass(frozen=True)
class ByBlock(Energy):
    """`Energy` with a threshold for each block of a transformer: the first number in a weight's name is its block."""

    blocks: tuple[float, ...] = ()

    def rank(self, spectrum: Spectrum) -> int:
        """Return the rank of `Energy` with the block's threshold; outside the blocks with `threshold`."""
        block = re.search(r"\d+", spectrum.name)
        return Energy(self.blocks[int(block[0])] if block else self.threshold).rank(spectrum)


@dataclass(frozen=True)
class Way:
    """One way to fine-tune; without a threshold nothing is protected, of several the blocks have all but the first.

    `replay` is old data beside a batch, as a share of it; `distil` the weight of the distance to the model before;
    `rank` that of a LoRA that is trained instead of the weights, or below one the share of each weight's singular
    directions that PEFT's OSF keeps.
    """

    rate: float
    threshold: float | list[float] | None = None
    project: Literal["update", "both"] = "both"
    replay: float = 0.0
    distil: float = 0.0
    rank: float = 0

    def optimizer(self, model: nn.Module, steps: int, **options: Any) -> tuple[NullSpaceOptimizer, LambdaLR]:
        """AdamW with `options` on what is trainable, wrapped, and its rate: a cosine every `steps`, warmed up."""
        base = AdamW([p for p in model.parameters() if p.requires_grad], lr=self.rate, **options)
        first, *blocks = self.threshold if isinstance(self.threshold, list) else [self.threshold or 0.99]
        policy = ByBlock(first, blocks=tuple(blocks)) if blocks else Energy(first)
        optimizer = NullSpaceOptimizer(base, model, policy=policy, project=self.project)
        warmup = max(1, steps // 12)

        def factor(step: int) -> float:
            return min(1.0, (step % steps + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * (step % steps) / steps))

        return optimizer, LambdaLR(optimizer, factor)

    def adapted(self, model: nn.Module, seed: int) -> nn.Module:
        """`model` with what `rank` asks for beside its linear layers, in evaluation mode; without one as it is."""
        if not self.rank:
            return model
        import peft

        torch.manual_seed(seed)
        r = self.rank
        config: Any = peft.LoraConfig(r=int(r), lora_alpha=int(2 * r)) if r >= 1 else peft.OSFConfig(effective_rank=r)
        config.target_modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]

    def old_rows(self, batch: int, generator: torch.Generator) -> int:
        """Number of rows of old data that stand beside this batch, `replay * batch` on average."""
        return int(torch.poisson(torch.tensor(self.replay * batch), generator=generator)) if self.replay else 0


def stored_bytes(way: Way, model: nn.Module, optimizer: NullSpaceOptimizer, beside: Iterable[Tensor]) -> int:
    """Bytes that the way keeps beside the weights: bases, what `rank` adds, and the tensors `beside`."""
    added = (parameter for parameter in model.parameters() if way.rank and parameter.requires_grad)
    bases = saved_bytes(optimizer.save) if way.threshold is not None else 0
    return bases + sum(tensor.nbytes for tensor in (*added, *beside))


def interpolation(
    model: nn.Module, optimizer: NullSpaceOptimizer, before: Mapping[str, Tensor]
) -> Callable[[float], nn.Module]:
    """Return a function that gives `model` with its present weights, taken back to `before` by a share (`blend`)."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def interpolated(share: float) -> nn.Module:
        model.load_state_dict(weights)
        optimizer.blend(before, share)
        return model

    return interpolated


def draw(curves: Mapping[str, Sequence[tuple[float, float]]], axes: tuple[str, str], file: str) -> None:
    """Draw one curve a method in `file`; `axes` are their labels."""
    figure, panel = plt.subplots(figsize=(6.0, 4.2), layout="tight")
    for method, points in curves.items():
        panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=method)
    panel.set(xlabel=axes[0], ylabel=axes[1])
    panel.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def listed(study: str) -> dict[str, Way]:
    """The ways of a study, from `ways.yaml`."""
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[study]
    return {name: Way(**arguments) for name, arguments in rows.items()}


def chosen(ways: Mapping[str, Way], parts: str) -> dict[str, Way]:
    """Those of `ways` whose names hold one of `parts`, commas between (or ; where one holds a comma); all for none."""
    wanted = [part.strip() for part in parts.split(";" if ";" in parts else ",") if part.strip()] or [""]
    if unknown := [part for part in wanted if not any(part in name for name in ways)]:
        raise SystemExit(f"--methods: no way is called {' or '.join(unknown)}; choose from {'; '.join(ways)}")
    return {name: way for name, way in ways.items() if any(part in name for part in wanted)}


def parser(study: str, about: str | None, seeds: str, steps: int) -> argparse.ArgumentParser:
    """The command line of a study with these defaults; it takes further options."""
    found = argparse.ArgumentParser(prog=f"python -m reference.studies.{study}", description=about)
    found.add_argument("--methods", default="", help="parts of names, with commas (; where one holds a comma)")
    found.add_argument("--seeds", default=seeds, help="numbers separated by commas")
    found.add_argument("--split", default="test", choices=("validation", "test"))
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--output", required=True, help="folder of the results")
    found.add_argument("--figure", default="", help="file of the figure")
    return found
