"""Orthogonal turns of the linears of both towers' MLPs: OrthSR with its control, and turns inside free directions.

OrthSR (arXiv 2407.08374) from its description, since no code is published: weights are multiplied by block-diagonal
orthogonal matrices, and the posteriors on the task's own images are held to those of the pretrained model. Unknown are
the schedule, the side (here the inputs, as in OFT's code) and which of the loss's weights 1.5 and 1 belongs to which
term (here `distillation_weight`). Its attentive CutOut is left out: sources differ in what it cuts.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nullspace_optim.clip import distillation_loss
from nullspace_optim.methods import begin_turn, merge_turn
from reference.methods.base import Method
from reference.methods.nullspace import NullSpaceReference
from reference.training.steps import Batch

TURNED, BLOCKS = re.compile(r".*\.mlp\.c_(fc|proj)\.weight"), 4


def turned(model: nn.Module) -> list[str]:
    """Names of the weights that turn."""
    return [name for name, _ in model.named_parameters() if TURNED.fullmatch(name)]


class OrthSR(Method):
    """OrthSR: one turn in four blocks for the whole sequence (turns after one another are a turn), with its KL term."""

    name = "orthsr"
    orthogonal: ClassVar[bool] = True

    def make_optimizer(self) -> Optimizer:
        """AdamW on the turns alone."""
        self.pretrained, self.texts = self.clip.copy(), dict[int, Tensor]()
        self.pretrained.model.eval()
        self.clip.model.requires_grad_(False)
        begin_turn(self.clip.model, turned(self.clip.model), blocks=BLOCKS, orthogonal=self.orthogonal)
        return super().make_optimizer()

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, and distillation of the pretrained posteriors on the same images."""
        now, before = self.clip.model, self.pretrained.model
        scale = now.logit_scale.exp()  # type: ignore[operator]
        with torch.no_grad():
            if batch.task not in self.texts:
                self.texts = {batch.task: before.encode_text(batch.tokens, normalize=True)}  # type: ignore[operator]
            teacher = before.encode_image(batch.images, normalize=True), self.texts[batch.task], scale  # type: ignore[operator]
        images, texts = now.encode_image(batch.images, normalize=True), now.encode_text(batch.tokens, normalize=True)  # type: ignore[operator]
        labels, smoothing = batch.labels.to(images.device), self.config.label_smoothing
        new = F.cross_entropy((scale * images @ texts.T).float(), labels, label_smoothing=smoothing)
        held = distillation_loss((images, texts, scale), teacher, temperature=1.0, rows="image")
        return new + self.config.distillation_weight * held


class OrthSRFree(OrthSR):
    """The control: the same blocks, unconstrained (`Q = I + R`)."""

    name = "orthsr-free"
    orthogonal = False


class FreeTurns(NullSpaceReference):
    """Ours as turns: each task turns these weights inside the directions that pool and earlier tasks left free.

    No step is corrected: what is kept cannot move, whatever the optimizer. After the task the turn is written into the
    weights, which are then consolidated as under `nullspace-reference`. First linears alone: a turn is dense, so each
    step solves a system of its width, and that of the second ones is four times as wide.
    """

    name = "turn"

    def make_optimizer(self) -> Optimizer:
        """The guard, which never steps."""
        self.guard = super().make_optimizer()
        return self.guard

    def _begin(self) -> None:
        first = [name for name in turned(self.clip.model) if "c_fc" in name]
        rotations = begin_turn(self.guard, first)  # type: ignore[arg-type]
        self.optimizer = AdamW(rotations, weight_decay=self.config.weight_decay, fused=True)  # type: ignore[assignment]

    def before_task(self, number: int) -> None:
        """Begin to turn; AdamW on the turns alone."""
        self._begin()

    def after_task(self, number: int) -> dict[str, Any]:
        """Write the turn into the weights, then protect."""
        merge_turn(self.guard)  # type: ignore[arg-type]
        self.optimizer = self.guard  # type: ignore[assignment]
        return super().after_task(number)

    def state(self) -> dict[str, Any]:
        """The guard as well."""
        return {**super().state(), "guard": self.guard.state_dict()}

    def load_state(self, state: dict[str, Any], number: int) -> None:
        """Turn again if the run was stopped within a task."""
        self.guard.load_state_dict(state["guard"])
        if any(name.endswith(".rotation") for name in state["model"]):
            self._begin()
        super().load_state(state, number)
