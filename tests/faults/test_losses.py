"""Faults of distillation that no other file tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nullspace_optim.clip import alignment_loss, distillation_loss
from nullspace_optim.errors import BatchError


def outputs(scale: float = 10.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (normalize(torch.randn(4, 8, generator=generator), dim=1) for _ in range(2))
    return {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(scale)}


@pytest.mark.fault(115)
@pytest.mark.parametrize("scale", [math.inf, math.nan, math.exp(89) * 1e300], ids=["inf", "nan", "overflow"])
def test_a_logit_scale_that_overflowed_is_named(scale: float) -> None:
    for loss in (lambda: distillation_loss(outputs(), outputs(scale, 1)), lambda: alignment_loss(outputs(scale))):
        with pytest.raises(BatchError, match=r"logit_scale is (inf|nan).*clamp"):
            loss()


@pytest.mark.fault(115)
def test_features_of_norm_zero_have_a_finite_loss_and_gradient() -> None:
    student = outputs()
    student["image_features"][1] = 0
    student["image_features"].requires_grad_()
    loss = distillation_loss(student, outputs(seed=1)) + alignment_loss(student)
    loss.backward()
    assert loss.isfinite()
    gradient = student["image_features"].grad
    assert gradient is not None and gradient.isfinite().all()


@pytest.mark.fault(116)
def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = outputs(), outputs(seed=1)
    for part in (*student.values(), *teacher.values()):
        part.requires_grad_()
    distillation_loss(student, teacher).backward()
    assert all(part.grad is None for part in teacher.values())
    assert all(part.grad is not None for part in student.values())
