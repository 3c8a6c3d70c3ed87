"""LoRSU (arXiv 2502.04098): of the image tower, only the heads and entries train that a task's gradient is largest for.

As released (the variant with CLIP's loss): a tenth of the entries of each `c_fc`, a LoRA on the rows of two heads of
sixteen and on `visual.proj`, and the biases of both layers; chosen anew by the signed mean gradient before each task.
Ours: the common loss, rank and AdamW, at least one head, gradients of `consolidation_images` images; and entries that
were not chosen are put back after each step, so that they stay bitwise under decay and moments as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nullspace_optim.methods import begin_low_rank, leading_entries, leading_heads, summed_gradients
from reference.errors import ExperimentError
from reference.methods.base import Method
from reference.methods.nullspace import NullSpaceReference
from reference.training.clip import classification_loss
from reference.training.steps import Batch, Batches, attention, precision, seeded

SHARE, OF_HEADS = 0.1, 8  # a tenth of the entries, an eighth of the heads


class LoRSU(Method):
    """LoRSU with the rank `lora_rank`; what was added to heads is written into them before the next task."""

    name = "lorsu"
    saved = ("masks",)

    def make_optimizer(self) -> Optimizer:
        """AdamW on low-rank additions, the entries of `c_fc`, and biases."""
        model: Any = self.clip.model.requires_grad_(False)
        if not hasattr(model.visual, "transformer"):
            raise ExperimentError(f"{self.name}: the model has no vision transformer, whose heads and entries train")
        blocks = {f"visual.transformer.resblocks.{n}": b for n, b in enumerate(model.visual.transformer.resblocks)}
        self.heads = {f"{name}.attn.in_proj_weight": block.attn.num_heads for name, block in blocks.items()}
        self.entries: dict[str, Tensor] = {f"{name}.mlp.c_fc.weight": b.mlp.c_fc.weight for name, b in blocks.items()}
        self.weights: dict[str, Tensor] = {**self.entries, **{name: model.get_parameter(name) for name in self.heads}}
        self.choose(self.weights, seeded(self.setting.seed))  # any: before each task they are chosen anew
        for block in blocks.values():
            for part in (block.mlp.c_fc.weight, block.mlp.c_fc.bias, block.attn.in_proj_bias):
                part.requires_grad_(True)
        return super().make_optimizer()

    def choose(self, gradients: Mapping[str, Tensor], draw: torch.Generator) -> None:
        """Let what `gradients` are largest for train, and begin the additions to heads anew."""
        self.masks = {name: leading_entries(gradients[name], SHARE) for name in self.entries}
        rows = {name: leading_heads(gradients[name], n, max(1, n // OF_HEADS)) for name, n in self.heads.items()}
        rows["visual.proj"] = torch.arange(self.clip.model.visual.proj.shape[0])  # type: ignore[union-attr, index, arg-type]
        begin_low_rank(self.clip.model, rows, self.config.lora_rank, generator=draw)

    def before_task(self, number: int) -> None:
        """Choose heads and entries."""
        super().before_task(number)
        self.choose(self.gradients(number), seeded(self.setting.seed, number, 9))
        self._keep()

    def gradients(self, number: int) -> dict[str, Tensor]:
        """What heads and entries are chosen by: the sum of the task's gradients."""
        task, model = self.setting.tasks[number], self.clip.model.eval()
        drawn = task.train.drawn(self.config.consolidation_images, seed=self.setting.seed)
        tokens = self.clip.tokens(task.prompts())

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            with precision(self.clip, self.config):
                return len(batch[1]) * classification_loss(model, *batch, tokens, self.config.label_smoothing)

        with attention(self.clip):
            found = summed_gradients(list(self.weights.values()), Batches(self.clip, drawn), loss)
        return dict(zip(self.weights, found))

    def _keep(self) -> None:
        self.kept = {name: weight.detach().clone() for name, weight in self.entries.items()}

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Put back the entries that were not chosen."""
        for name, weight in self.entries.items():
            weight.copy_(torch.where(self.masks[name], weight, self.kept[name]))

    def trained_parameters(self) -> int:
        """Count of the numbers that may change in the task at work."""
        return super().trained_parameters() - sum(int((~mask).sum()) for mask in self.masks.values())

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Take up what `state` returned during task `number`."""
        super().load_state(state, number)
        self._keep()


class LoRSURandom(LoRSU):
    """The control: as many heads and entries, chosen at random."""

    name = "lorsu-random"

    def gradients(self, number: int) -> dict[str, Tensor]:
        """Noise in place of gradients."""
        draw = seeded(self.setting.seed, number, 11)
        return {n: torch.randn(w.shape, generator=draw).to(w.device) for n, w in self.weights.items()}


class LoRSUNullSpace(LoRSU, NullSpaceReference):
    """LoRSU's choice under our protection, which a choice of rows leaves exact: whole heads, and neurons of `c_fc`.

    No step moves another row, nor a direction that pool and earlier tasks used. Nothing of low rank is added.
    """

    name = "lorsu-nullspace"

    def make_optimizer(self) -> Optimizer:
        """AdamW under protection, given the gradients of chosen rows alone."""
        optimizer = super().make_optimizer()
        optimizer.register_step_pre_hook(self._mask)
        return optimizer

    def choose(self, gradients: Mapping[str, Tensor], draw: torch.Generator) -> None:
        """Let the rows that `gradients` are largest for train."""
        self.entries, self.masks = self.weights, {}
        self.clip.model.visual.proj.requires_grad_(True)  # type: ignore[union-attr]
        for name, weight in self.weights.items():
            heads, score = self.heads.get(name), gradients[name].square().sum(dim=1)
            few = score.topk(max(1, round(SHARE * len(score)))).indices
            rows = leading_heads(gradients[name], heads, max(1, heads // OF_HEADS)) if heads else few
            self.masks[name] = torch.zeros_like(weight, dtype=torch.bool).index_fill(0, rows.to(weight.device), True)
            weight.requires_grad_(True)

    def _mask(self, *_: object) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])
