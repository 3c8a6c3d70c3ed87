from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nullspace_optim import ShapeError
from nullspace_optim.clip import alignment_loss, distillation_loss, random_alignment_loss
from nullspace_optim.errors import BatchError, OptionError


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def outputs(images: int = 5, texts: int = 5, scale: float = 100.0, grad: bool = False) -> dict[str, Tensor]:
    parts = {"image_features": unit(images, 8), "text_features": unit(texts, 8)}
    return {**{k: v.requires_grad_(grad) for k, v in parts.items()}, "logit_scale": torch.tensor(scale)}


def slow_rows(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """One entry at a time, in float64: `T^2 mean_i sum_j -p_ij log q_ij`."""
    total = 0.0
    for ours, theirs in zip(student.double() / temperature, teacher.double() / temperature):
        p, q = theirs.exp() / theirs.exp().sum(), ours.exp() / ours.exp().sum()
        total += sum(float(-p[j] * q[j].log()) for j in range(len(p)))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_distillation_is_its_formula(temperature: float) -> None:
    student, teacher = outputs(4, 6, scale=9.0), outputs(4, 6, scale=11.0)
    ours, theirs = (o["logit_scale"] * o["image_features"] @ o["text_features"].T for o in (student, teacher))
    image, text = slow_rows(ours, theirs, temperature), slow_rows(ours.T, theirs.T, temperature)
    for rows, expected in (("image", image), ("text", text), ("both", image + text)):
        found = distillation_loss(student, teacher, temperature=temperature, rows=rows)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_distillation_has_the_gradient_of_kl_and_is_least_at_the_teacher() -> None:
    student, teacher = outputs(4, 6, 9.0, grad=True), outputs(4, 6, 11.0)
    features = (student["image_features"], student["text_features"])
    one = torch.autograd.grad(distillation_loss(student, teacher), features)
    ours, theirs = (o["logit_scale"] * o["image_features"] @ o["text_features"].T / 2 for o in (student, teacher))
    divergence = sum(
        4 * F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), log_target=True, reduction="batchmean")
        for s, t in ((ours, theirs), (ours.T, theirs.T))
    )
    for a, b in zip(one, torch.autograd.grad(divergence, features)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    twin = {name: part.clone().requires_grad_(name != "logit_scale") for name, part in teacher.items()}
    gradients = torch.autograd.grad(distillation_loss(twin, teacher), [twin["image_features"], twin["text_features"]])
    assert max(float(g.abs().max()) for g in gradients) < 1e-5


@pytest.mark.parametrize("given", [torch.as_tensor, lambda t: {"logits": t}, lambda t: SimpleNamespace(logits=t)])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_distillation_takes_the_logits_of_any_model(given: Any, shape: tuple[int, ...]) -> None:
    ours, theirs = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    loss = distillation_loss(given(ours), given(theirs), temperature=3.0)
    assert float(loss) == pytest.approx(slow_rows(ours.detach().view(-1, 7), theirs.detach().view(-1, 7), 3.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert theirs.grad is None and ours.grad is not None and float(ours.grad.abs().max()) > 0
    half = distillation_loss(given(ours.bfloat16()), given(theirs.bfloat16()), temperature=3.0)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(loss), rel=1e-2)


def test_rows_of_logits_that_do_not_count_have_no_part_in_distillation() -> None:
    ours, theirs = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    labels = torch.tensor([[0, -100, 5], [-100, -100, 1]])
    loss = distillation_loss(ours, theirs, labels=labels)
    assert float(loss) == pytest.approx(slow_rows(ours.detach()[labels >= 0], theirs[labels >= 0], 2.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and torch.equal(ours.grad.norm(dim=-1) > 0, labels >= 0)


def test_classes_that_both_models_hide_have_no_part_in_distillation() -> None:
    ours, theirs = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    hidden = torch.tensor([False, True, False, False, True, False, False])
    loss = distillation_loss(*(t.masked_fill(hidden, float("-inf")) for t in (ours, theirs)))
    assert float(loss) == pytest.approx(slow_rows(ours.detach()[:, ~hidden], theirs[:, ~hidden], 2.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and torch.equal(ours.grad.norm(dim=0) > 0, ~hidden)


def test_a_clip_that_also_writes_captions_is_distilled_as_a_clip() -> None:
    student, teacher = outputs(), outputs()
    captions = ({**part, "logits": torch.randn(5, 9, 11)} for part in (student, teacher))
    assert torch.equal(distillation_loss(*captions, rows="image"), distillation_loss(student, teacher, rows="image"))


def test_outputs_without_storage_are_not_taken_for_the_same() -> None:
    assert distillation_loss(*(torch.randn(4, 7, device="meta") for _ in range(2))).is_meta


def test_logits_that_cannot_be_distilled_are_refused() -> None:
    logits = torch.randn(4, 7)
    with pytest.raises(OptionError, match="same outputs"):
        distillation_loss(logits, logits)
    with pytest.raises(ShapeError, match=r"\(4, 7\) but teacher logits \(4, 6\)"):
        distillation_loss(logits, torch.randn(4, 6))
    with pytest.raises(ShapeError, match="teacher logits none"):
        distillation_loss(logits, outputs())
    with pytest.raises(ShapeError, match="one a row"):
        distillation_loss(logits, torch.randn(4, 7), labels=torch.zeros(5))
    with pytest.raises(BatchError, match="every row"):
        distillation_loss(logits, torch.randn(4, 7), labels=torch.full((4,), -100))
    with pytest.raises(BatchError, match="hold no row"):
        distillation_loss(logits[:0], torch.randn(0, 7))
    for options in ({"truth": 0.5}, {"rows": "text"}):
        with pytest.raises(OptionError, match="pairs of a CLIP"):
            distillation_loss(logits, torch.randn(4, 7), **options)  # type: ignore[arg-type]


def slow_alignment(logits: Tensor, labels: list[int], smoothing: float) -> float:
    """GNSP's targets, entry by entry: label equality, normalised by rows, mixed with the uniform distribution."""
    n, total = len(labels), 0.0
    for side in (logits.double(), logits.T.double()):
        for i in range(n):
            log_q = side[i] - side[i].exp().sum().log()
            same = [labels[i] == labels[j] for j in range(n)]
            total -= (
                sum(((1 - smoothing) * same[j] / sum(same) + smoothing / n) * float(log_q[j]) for j in range(n)) / n
            )
    return total


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [7, 7, 3, 7, 3], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_alignment_is_its_formula(labels: list[int], smoothing: float) -> None:
    pairs = outputs(scale=10.0)
    logits = 10.0 * pairs["image_features"] @ pairs["text_features"].T
    found = alignment_loss(pairs, torch.tensor(labels), smoothing=smoothing)
    assert float(found) == pytest.approx(slow_alignment(logits, labels, smoothing), rel=1e-5)


def test_alignment_without_labels_is_the_loss_of_clip() -> None:
    pairs = outputs()
    logits = 100 * pairs["image_features"] @ pairs["text_features"].T
    expected = F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))
    torch.testing.assert_close(alignment_loss(pairs, smoothing=0.0), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 100.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.fault(115)
def test_finite_with_extreme_scales_and_a_single_class(scale: float, dtype: torch.dtype) -> None:
    student = outputs(scale=scale)
    student = {
        "logit_scale": student["logit_scale"],
        **{k: student[k].to(dtype).requires_grad_() for k in list(student)[:2]},
    }
    value = distillation_loss(student, outputs(scale=scale)) + alignment_loss(student, torch.zeros(5))
    gradients = torch.autograd.grad(value, [student["image_features"], student["text_features"]])
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    alone = {"image_features": unit(1, 8), "text_features": unit(1, 8), "logit_scale": torch.tensor(scale)}
    assert float(alignment_loss(alone)) == 0.0


def test_tuples_and_biases_are_read_like_dictionaries() -> None:
    student, teacher = outputs(), outputs()
    as_tuples = tuple(student.values()), tuple(teacher.values())
    torch.testing.assert_close(distillation_loss(*as_tuples), distillation_loss(student, teacher))
    biased = {**student, "logit_bias": torch.tensor(-10.0)}
    torch.testing.assert_close(distillation_loss(biased, teacher), distillation_loss(student, teacher))
    torch.testing.assert_close(alignment_loss((*as_tuples[0], torch.tensor(3.0))), alignment_loss(student))


def test_products_are_not_rounded_under_autocast() -> None:
    student, teacher = outputs(), outputs()
    expected = distillation_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation_loss(student, teacher), expected)


@pytest.mark.fault(114)
def test_a_teacher_that_is_the_student_is_refused() -> None:
    student = outputs(grad=True)
    for teacher in (student, {name: part.detach() for name, part in student.items()}):
        with pytest.raises(OptionError, match="nothing to distil"):
            distillation_loss(student, teacher)
    distillation_loss(student, {name: part.detach().clone() for name, part in student.items()})
    distillation_loss(student, {**outputs(), "text_features": student["text_features"]})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: distillation_loss(outputs(), outputs(), temperature=0.0), OptionError, "temperature=0.0"),
        (lambda: distillation_loss(outputs(), outputs(), temperature=float("nan")), OptionError, "temperature=nan"),
        (lambda: distillation_loss(outputs(), outputs(), rows="columns"), OptionError, "rows='columns'"),  # type: ignore[arg-type]
        (lambda: distillation_loss(outputs(4), outputs(5)), ShapeError, "feed both alike"),
        (lambda: alignment_loss(torch.ones(3)), BatchError, "found Tensor"),
        (lambda: alignment_loss({**outputs(), "text_features": None}), BatchError, "no tensor 'text_features'"),
        (lambda: alignment_loss(outputs(4, 5)), ShapeError, "expected n pairs"),
        (lambda: alignment_loss(outputs(), torch.zeros(4)), ShapeError, r"\(4,\)"),
        (lambda: alignment_loss({**outputs(), "image_features": unit(5, 4)}), ShapeError, r"\[m, e\]"),
        (lambda: alignment_loss(outputs(), smoothing=1.5), OptionError, "smoothing=1.5"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("as_dict", [True, False])
def test_on_a_real_open_clip_model(as_dict: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 6, "vocab_size": 20, "width": 16, "heads": 1, "layers": 1},
        output_dict=as_dict,
    )
    teacher = copy.deepcopy(model)
    images, texts = torch.randn(4, 3, 16, 16), torch.randint(1, 20, (4, 6))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        target = teacher(images, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(15):
        value = distillation_loss(model(images, texts), target) + 0.75 * alignment_loss(model(images, texts))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    assert found[-1] < found[0]
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("truth", [0.3, 1.0])
def test_the_truth_is_mixed_into_the_teachers_answers(truth: float) -> None:
    torch.manual_seed(0)
    student, teacher, labels = outputs(scale=3.0), outputs(scale=3.0), torch.tensor([0, 1, 0, 2, 1])
    ours, theirs = (3.0 * o["image_features"].double() @ o["text_features"].double().T for o in (student, teacher))
    total = 0.0
    for one, other in ((ours, theirs), (ours.T, theirs.T)):
        for i in range(5):
            same = [j for j in range(5) if labels[j] == labels[i]]
            p, q = (torch.exp(row[i] / 2.0) / torch.exp(row[i] / 2.0).sum() for row in (other, one))
            for j in range(5):
                target = truth * (j in same) / len(same) + (1 - truth) * float(p[j])
                total -= 4.0 * target * float(q[j].log()) / 5
    found = distillation_loss(student, teacher, truth=truth, labels=labels)
    assert float(found) == pytest.approx(total, rel=1e-5)
    if truth == 1.0:
        softened = {**student, "logit_scale": torch.tensor(1.5)}
        assert float(found) == pytest.approx(4 * float(alignment_loss(softened, labels, smoothing=0.0)), rel=1e-6)


def test_truth_asks_for_pairs_and_a_share() -> None:
    with pytest.raises(ShapeError, match="expected n pairs"):
        distillation_loss(outputs(4, 3), outputs(4, 3), truth=0.5)
    with pytest.raises(OptionError, match=r"truth=1.5: expected a number in \[0, 1\]"):
        distillation_loss(outputs(), outputs(), truth=1.5)
    assert float(distillation_loss(outputs(4, 3), outputs(4, 3), truth=0.0)) > 0


def test_random_alignment_draws_one_point_for_both_features_of_a_pair() -> None:
    images, texts = 3 * torch.randn(6, 4), (2 * torch.randn(6, 4)).requires_grad_()
    found = random_alignment_loss(images, texts, generator=torch.Generator().manual_seed(3))
    points = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    slow = sum(float((images[i] - points[i]).square().sum() + (texts[i] - points[i]).square().sum()) for i in range(6))
    assert float(found) == pytest.approx(slow / 12, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, texts)
    assert torch.allclose(gradient, (texts - points) / 6)
    mean = (images + texts) / 2  # the points that all pairs would meet at minimise it, and apart they cost their gap
    meeting = random_alignment_loss(mean, mean, generator=torch.Generator().manual_seed(3))
    assert float(found - meeting) == pytest.approx(float((images - texts).square().sum()) / 24, rel=1e-4)


def test_random_alignment_is_a_penalty_on_norms_in_expectation() -> None:
    images, texts, generator = 3 * torch.randn(5, 4), torch.randn(5, 4), torch.Generator().manual_seed(0)
    drawn = torch.stack([random_alignment_loss(images, texts, generator=generator) for _ in range(4000)])
    expected = float((images.square().sum() + texts.square().sum()) / 10 + 4)
    assert abs(float(drawn.mean()) - expected) < 4 * float(drawn.std()) / 4000**0.5
    half = random_alignment_loss(images.bfloat16(), texts.bfloat16())
    assert half.dtype == torch.float32
    for wrong in (torch.randn(4, 4), torch.randn(5, 3), torch.randn(5)):
        with pytest.raises(ShapeError, match="expected n pairs"):
            random_alignment_loss(images, wrong)


def test_distillation_is_traced_and_differentiated_as_a_function() -> None:
    ours, theirs = torch.randn(6, 5), torch.randn(6, 5)
    expected = distillation_loss(ours, theirs)
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ours, theirs), expected)
    gradient = torch.func.grad(distillation_loss)(ours, theirs)
    (other,) = torch.autograd.grad(distillation_loss(found := ours.clone().requires_grad_(), theirs), found)
    torch.testing.assert_close(gradient, other)
    with pytest.raises(OptionError, match="same outputs"):
        torch.func.grad(lambda logits: distillation_loss(logits, logits))(ours)


@pytest.mark.parametrize("loss", [lambda out, y: distillation_loss(out, out.clone(), labels=y), alignment_loss])
def test_labels_that_are_no_tensor_are_refused_with_the_way_out(loss: Any) -> None:
    with pytest.raises(OptionError, match=r"labels: expected a tensor, found list: torch\.as_tensor\(labels\)"):
        loss(torch.randn(3, 3), [0, 1, 2])


def test_labels_that_would_count_for_nothing_are_refused() -> None:
    logits, pairs = torch.randn(3, 4, requires_grad=True), outputs()
    for mask in (torch.tensor([True, False, True]), torch.tensor([0.0, -100.0, 1.0])):
        with pytest.raises(OptionError, match="expected class numbers, -100 for rows"):
            distillation_loss(logits, torch.randn(3, 4), labels=mask)
    with pytest.raises(OptionError, match="give truth above 0"):
        distillation_loss(pairs, outputs(), labels=torch.arange(5))
    ignored = torch.tensor([0, -100, 1, -100, 2])
    for loss in (
        lambda: distillation_loss(pairs, outputs(), labels=ignored, truth=0.5),
        lambda: alignment_loss(pairs, ignored),
    ):
        with pytest.raises(BatchError, match="leave such pairs out"):
            loss()
