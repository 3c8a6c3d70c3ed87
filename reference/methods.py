"""The methods that are compared: what happens before, during and after a task.

A method owns the model's optimizer for the whole sequence; the base optimizer starts afresh with each task.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import AdamW, Optimizer

from nullspace_optim import Energy, NullSpaceOptimizer, clip_forward
from reference.clip import Clip, classification_loss
from reference.config import Config
from reference.errors import ExperimentError

Batches = Iterable[tuple[Tensor, Tensor]]


class FineTune:
    """Plain continual fine-tuning: AdamW on everything except `logit_scale`, both towers."""

    name: ClassVar[str] = "finetune"
    trains: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def __init__(self, clip: Clip, config: Config) -> None:
        self.clip = clip
        self.config = config
        trained = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
        base = AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.optimizer: Optimizer = self.wrap(base)

    def wrap(self, base: Optimizer) -> Optimizer:
        """The optimizer whose `step` is called."""
        return base

    def before_task(self) -> None:
        """Forget moments and step counts of the previous task."""
        self.optimizer.state.clear()

    def loss(self, images: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
        """Cross entropy over the classes of the task, label smoothing as in ZSCL; scalar."""
        return classification_loss(self.clip.model, images, labels, tokens, self.config.label_smoothing)

    def after_task(self, name: str, batches: Batches, tokens: Tensor) -> dict[str, Any]:
        """What is done with the finished task; returns what the log should know."""
        return {}


class ZeroShot(FineTune):
    """The pretrained model, never trained: every row of its accuracy matrix is the pretrained row."""

    name = "zero-shot"
    trains = False


class NullSpace(FineTune):
    """Ours: after each AdamW step the weights are corrected; kept directions of earlier tasks do not move."""

    name = "nullspace"
    optimizer: NullSpaceOptimizer

    @property
    def project(self) -> Literal["update", "gradient", "both"]:
        """What is projected: the update, or the gradient as well."""
        return self.config.project

    def wrap(self, base: Optimizer) -> Optimizer:
        """AdamW under protection."""
        return NullSpaceOptimizer(base, self.clip.model, policy=Energy(self.config.energy), project=self.project)

    def after_task(self, name: str, batches: Batches, tokens: Tensor) -> dict[str, Any]:
        """Protect what the images of `batches` and the prompts `tokens` use."""
        forward = clip_forward(self.clip.model, tokens)
        report = self.optimizer.consolidate(batches, name=name, forward=forward, progress=False)
        return {"report": str(report)}


class Gradient(NullSpace):
    """As published by the gradient-projection family (GPM, GNSP): the gradient is projected, then AdamW steps."""

    name = "gradient"

    @property
    def project(self) -> Literal["update", "gradient", "both"]:
        """The gradient alone."""
        return "gradient"


class NullSpaceReference(NullSpace):
    """Ours, with a pool of general images and captions consolidated before task 1: protects what was pretrained."""

    name = "nullspace-reference"
    needs_reference = True


METHODS: dict[str, type[FineTune]] = {m.name: m for m in (ZeroShot, FineTune, Gradient, NullSpace, NullSpaceReference)}


def chosen_methods(names: tuple[str, ...]) -> tuple[type[FineTune], ...]:
    """The classes of `names`; `all` stands for every method.

    Raises:
        ExperimentError: a name that is not a method.
    """
    for name in names:
        if name != "all" and name not in METHODS:
            raise ExperimentError(f"unknown method {name!r} in methods: choose from {', '.join(METHODS)}, or all")
    return tuple(METHODS.values()) if "all" in names else tuple(METHODS[name] for name in dict.fromkeys(names))
