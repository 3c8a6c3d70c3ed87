"""Losses that hold a CLIP to what it was, on the outputs of open_clip: distillation and modality alignment.

Distillation takes the logits of any other model as well. For a CLIP both are symmetric: one term for image-to-text
rows, one for text-to-image rows of the same logits. With unit features `I` `[n, e]`, `T` `[m, e]` and
`s = exp(logit_scale)` (and a bias `b` where the model has one), the logits are `L = s I T^T + b`, `[n, m]`. All
products are in float32 (float64 for float64 features), also under autocast, and every value is finite for finite
logits.

Sources: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) on a batch of reference pairs as in ZSCL (Zheng
et al. 2023, arXiv 2303.06628); modality alignment preservation as in GNSP (arXiv 2507.19839) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import BatchError, OptionError, ShapeError
from .model.find import unwrap
from .options import check_choice

Rows = Literal["both", "image", "text"]
IGNORED = -100  # the label of torch's `cross_entropy` for rows that do not count


class ClipOutputs(NamedTuple):
    """Unit features of images `[n, e]` and texts `[m, e]`, the factor of their products and, if any, a bias."""

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None

    def logits(self) -> Tensor:
        """`s I T^T + b`, `[n, m]`, in at least float32.

        Raises:
            BatchError: the scale is not finite.
        """
        if not torch.compiler.is_compiling() and not bool(self.logit_scale.isfinite().all()):
            raise BatchError(
                f"the outputs' logit_scale is {float(self.logit_scale.max())}: its exponential overflowed or training "
                "diverged; clamp the parameter (CLIP: to ln 100) or lower its learning rate"
            )
        images, texts = self.image_features, self.text_features
        wide = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.logit_scale.to(wide) * (images.to(wide) @ texts.to(wide).T)
            return logits if self.logit_bias is None else logits + self.logit_bias.to(wide)


def read_outputs(outputs: Any) -> ClipOutputs:
    """Read what an open_clip model returns, a tuple or (``output_dict=True``) a mapping.

    Raises:
        BatchError: neither of the two, or a part is missing or None (a model called without images or texts).
        ShapeError: features that are not `[n, e]` and `[m, e]`.
    """
    names = ClipOutputs._fields
    if isinstance(outputs, Mapping):
        parts: dict[str, Any] = {name: outputs.get(name) for name in names}
    elif isinstance(outputs, (tuple, list)):
        parts = dict(zip(names, outputs))
    else:
        raise BatchError(f"expected the outputs of a CLIP, a tuple or a mapping, found {type(outputs).__name__}")
    for name in names[:3]:
        if not isinstance(parts.get(name), Tensor):
            raise BatchError(
                f"the outputs hold no tensor '{name}' (found {type(parts.get(name)).__name__}); "
                "call the model with images and texts, as in model(images, texts)"
            )
    read = ClipOutputs(**parts)
    images, texts = read.image_features, read.text_features
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or not len(images) or not len(texts):
        raise ShapeError(
            f"image_features {tuple(images.shape)} and text_features {tuple(texts.shape)}: expected [n, e] and [m, e]"
        )
    return read


def distillation_loss(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 2.0,
    rows: Rows = "both",
    truth: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """Cross entropy between the softened logits of `teacher` and of `student` on the same inputs; scalar.

    Outputs are those of an open_clip model; or, of a classifier or language model, logits `[..., c]` or outputs that
    hold them (`logits`), with the mean over all rows of `c`, the last axis (of a segmentation `[n, c, h, w]` give
    `movedim(1, -1)`). There `labels` `[...]` only tell which rows count, those that are not -100; a causal language
    model's are one token late: `labels.roll(-1, 1)`, the last -100.

    With logits `t` and `s` `[n, m]` and temperature `T`: `T^2 * mean_i sum_j -softmax(t/T)_ij log softmax(s/T)_ij` over
    rows (``rows="image"``), the same over columns (``"text"``), or the sum of both (``"both"``, as GNSP and ZSCL do).
    It differs from the KL divergence by the teacher's entropy, which is constant: the gradient is the same. The teacher
    gets no gradient.

    With `truth` `a` above 0 the `n` images and texts are pairs, and the targets are `a Y + (1 - a) softmax(t/T)`, where
    `Y` `[n, n]` is that of `alignment_loss` for `labels` `[n]` (CLIP-Refine, arXiv 2504.12717, with ``truth=0.5``,
    ``temperature=1`` and half the sum of both directions).

    Raises:
        OptionError: `temperature` is not positive, `truth` is outside 0..1, `rows` is unknown, `labels` are no tensor,
            or a mask, teacher and student are the same outputs, `truth` or `rows` are given for logits, or `labels`
            without `truth` for a CLIP.
        BatchError: outputs that are not those of a CLIP and hold no logits; no row counts; labels of pairs hold -100.
        ShapeError: teacher and student saw different numbers of images or texts, or with `truth` no pairs; logits or
            labels of different shapes.
    """
    if not 0.0 <= truth <= 1.0:
        raise OptionError(f"truth={truth!r}: expected a number in [0, 1]")
    if not (isfinite(temperature) and temperature > 0):
        raise OptionError(f"temperature={temperature!r}: expected a number in (0, inf)")
    check_choice("rows", rows, get_args(Rows))
    _check_labels(labels)
    if (found := _logits_of(student)) is not None:
        if truth or rows != "both":
            raise OptionError("truth= and rows= are for pairs of a CLIP: add the cross entropy of the labels yourself")
        return temperature**2 * _softened(found, _logits_of(teacher), labels, temperature)
    pupil, master = read_outputs(student), read_outputs(teacher)
    if labels is not None and not truth:
        raise OptionError("labels= of a CLIP's pairs say what truth= adds: give truth above 0, or leave labels out")
    _refuse_self((pupil.image_features, master.image_features), (pupil.text_features, master.text_features))
    ours, theirs = pupil.logits(), master.logits().detach()
    if ours.shape != theirs.shape:
        raise ShapeError(
            f"student logits {tuple(ours.shape)} but teacher logits {tuple(theirs.shape)}: feed both alike"
        )
    known = _truth(theirs, labels) if truth else None
    sides = {"both": ((ours, theirs), (ours.T, theirs.T)), "image": ((ours, theirs),), "text": ((ours.T, theirs.T),)}
    total = ours.new_zeros(())
    for ours, theirs in sides[rows]:
        targets = F.softmax(theirs / temperature, dim=1)
        if known is not None:
            targets = truth * known + (1 - truth) * targets
        total = total + temperature**2 * F.cross_entropy(ours / temperature, targets)
    return total


def random_alignment_loss(images: Tensor, texts: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Squared distance of both features of a pair to one random point, mean over pairs and modalities; scalar.

    `1/(2n) sum_i (||I_i - r_i||^2 + ||T_i - r_i||^2)` with one `r_i ~ N(0, 1)^d` a pair and call, drawn by `generator`
    (of the features' device), the same for both modalities (random feature alignment, CLIP-Refine, arXiv 2504.12717).
    `images` and `texts` `[n, d]` are *raw* features: of unit features the expectation is constant. In expectation it is
    `sum_i (||I_i||^2 + ||T_i||^2) / (2n) + d`, a penalty on norms; all that couples the modalities is the shared noise.
    The released code takes the mean over dimensions as well, and not over modalities: `2 / d` times this value.

    Raises:
        ShapeError: features that are not `[n, d]` both.
    """
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise ShapeError(f"images {tuple(images.shape)} and texts {tuple(texts.shape)}: expected n pairs, [n, d] twice")
    wide = torch.promote_types(images.dtype, torch.float32)
    noise = torch.randn(images.shape, dtype=wide, device=images.device, generator=generator)
    distances = ((part.to(wide) - noise).square().sum() for part in (images, texts))
    return sum(distances, start=noise.new_zeros(())) / (2 * len(images))


def alignment_loss(outputs: Any, labels: Tensor | None = None, *, smoothing: float = 0.2) -> Tensor:
    """Symmetric contrastive loss of `n` image-text pairs, "modality alignment preservation" in GNSP; scalar.

    With logits `L` `[n, n]`: the cross entropy of `L` plus that of `L^T` against targets `Y`, `Y_ij = [y_i = y_j] /
    sum_k [y_i = y_k]`, mixed with the uniform distribution, `(1 - smoothing) Y + smoothing / n`. `labels` `[n]` say
    which pairs are of one kind (duplicate classes share the mass); by default every pair is a kind of its own, which
    is CLIP's own loss. GNSP weighs the sum by 0.75 and takes `smoothing=0.2`.

    Raises:
        OptionError: `smoothing` is outside 0..1, or `labels` are no tensor.
        BatchError: outputs that are not those of a CLIP, or labels that hold -100.
        ShapeError: unequal numbers of images, texts and labels.
    """
    if not 0.0 <= smoothing <= 1.0:
        raise OptionError(f"smoothing={smoothing!r}: expected a number in [0, 1]")
    _check_labels(labels)
    logits = read_outputs(outputs).logits()
    targets = _truth(logits, labels)
    losses = (F.cross_entropy(side, targets, label_smoothing=smoothing) for side in (logits, logits.T))
    return sum(losses, start=logits.new_zeros(()))


def _check_labels(labels: Any) -> None:
    if not (labels is None or isinstance(labels, Tensor)):
        raise OptionError(f"labels: expected a tensor, found {type(labels).__name__}: torch.as_tensor(labels)")


def _truth(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return `Y` `[n, n]`: the share of each text in the mass of an image, equal for all of one kind."""
    count = len(logits)
    labels = torch.arange(count, device=logits.device) if labels is None else labels.to(logits.device)
    if logits.shape[1] != count or labels.shape != (count,):
        raise ShapeError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected n pairs, [n, n] and [n]"
        )
    if not torch.compiler.is_compiling() and bool((labels == IGNORED).any()):
        raise BatchError(f"labels hold {IGNORED}, which would be a kind of pairs like any other: leave such pairs out")
    equal = (labels[:, None] == labels[None, :]).to(logits.dtype)
    return equal / equal.sum(dim=1, keepdim=True)


def _logits_of(outputs: Any) -> Tensor | None:
    """Return logits `[..., c]`, given as they are or as a part of outputs; `None` where there are none."""
    if isinstance(outputs, Mapping) and "image_features" in outputs:  # those of CoCa's captions are beside the point
        return None
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    found = outputs if isinstance(outputs, Tensor) else named
    return found if isinstance(found, Tensor) else None


def _softened(ours: Tensor, theirs: Tensor | None, labels: Tensor | None, temperature: float) -> Tensor:
    """Return the mean cross entropy of softened logits `[..., c]` over the rows that count."""
    if theirs is None or ours.shape != theirs.shape:
        other = "none" if theirs is None else tuple(theirs.shape)
        raise ShapeError(f"student logits {tuple(ours.shape)} but teacher logits {other}: feed both alike")
    if not ours.ndim or not ours.numel():
        raise BatchError(f"logits {tuple(ours.shape)} hold no row, so there is nothing to distil")
    _refuse_self((ours, theirs))
    if labels is not None and labels.shape != ours.shape[:-1]:
        raise ShapeError(f"labels {tuple(labels.shape)} for logits {tuple(ours.shape)}: expected one a row")
    if labels is not None and (labels.is_floating_point() or labels.dtype is torch.bool):
        raise OptionError(f"labels are {labels.dtype}: expected class numbers, {IGNORED} for rows that do not count")
    wide = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = (t.to(ours.device, wide).reshape(-1, t.shape[-1]) for t in (ours, theirs.detach()))
    if labels is not None:
        counted = labels.to(ours.device).flatten() != IGNORED
        if not torch.compiler.is_compiling() and not bool(counted.any()):
            raise BatchError(f"labels: every row is {IGNORED}, so there is nothing to distil")
        ours, theirs = ours[counted], theirs[counted]
    targets = F.softmax(theirs / temperature, dim=-1)
    logs = F.log_softmax(ours / temperature, dim=-1).masked_fill(targets == 0, 0)  # both may hide a class by -inf
    return -(targets * logs).sum(dim=-1).mean()


def _refuse_self(*pairs: tuple[Tensor, Tensor]) -> None:
    """Refuse a teacher whose outputs are the student's own tensors: nothing would be distilled."""
    if all(one is other or _address(one) == _address(other) != 0 for one, other in pairs):
        raise OptionError(
            "teacher and student are the same outputs, so there is nothing to distil; run a frozen copy of the model "
            "(copy.deepcopy before training) as the teacher"
        )


def _address(tensor: Tensor) -> int:
    """Return where `tensor` lies, 0 where that cannot be told: while tracing, within `torch.func`."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return 0 if traced else tensor.data_ptr()


class ClipForward:
    """`forward` for CLIP: images of every batch through one tower, the task's prompts through the other, once.

    Args:
        model: an open_clip model (`encode_image`, `encode_text`).
        tokens: tokenized prompts of the task, `[classes, context]`.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._fed = False

    def restart(self) -> None:
        """Feed the prompts again with the next batch (a new pass begins)."""
        self._fed = False

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Return normalised `image_features` `[n, e]` and, on the first batch of a pass, `text_features` `[classes,
        e]`.
        """
        model: Any = self._model
        device = next(self._model.parameters()).device
        images = batch if isinstance(batch, Tensor) else batch[0]
        outputs = {"image_features": model.encode_image(images.to(device), normalize=True)}
        if not self._fed:
            outputs["text_features"] = model.encode_text(self._tokens.to(device), normalize=True)
            self._fed = True
        if hasattr(model, "logit_scale"):
            outputs["logit_scale"] = model.logit_scale.exp()
        return outputs


def clip_forward(model: nn.Module, tokens: Tensor) -> ClipForward:
    """Return the ready `forward=` of `consolidate` for an open_clip model and the task's prompts `tokens`."""
    return ClipForward(unwrap(model), tokens)
