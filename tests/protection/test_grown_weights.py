"""Weights that grow between consolidations: what was there stays kept exactly, what is new learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import relative_drift

from nullspace_optim import Energy, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import NullSpaceWarning, ShapeError
from nullspace_optim.policies import SGP, TRGP

pytestmark = pytest.mark.filterwarnings("ignore::nullspace_optim.errors.NullSpaceWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def more(tensor: Tensor, axis: int, count: int) -> Tensor:
    """Return `tensor` with `count` random entries behind the old ones."""
    shape = [*tensor.shape]
    shape[axis] = count
    return torch.cat([tensor.detach(), torch.randn(shape, dtype=tensor.dtype) / 8], axis)


class Grows(nn.Module):
    """A model with one layer that grows by `grow`; `old` and `new` are inputs of the first and the next tasks."""

    axis = -1  # of the output, along which it grows

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 16)
        self.old, self.new = torch.randn(3, 12), torch.randn(24, 12)

    def features(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.body(inputs))


class Replaced(Grows):
    """A classifier that is replaced by a wider one."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3, bias=bias)

    def grow(self) -> None:
        wider = nn.Linear(16, self.head.out_features + 2, bias=self.head.bias is not None)
        for name, value in self.head.named_parameters():
            getattr(wider, name).data[: len(value)] = value.data
        self.head = wider

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


class InPlace(Replaced):
    """A classifier whose tensors are exchanged through `.data`."""

    def grow(self) -> None:
        for parameter in self.head.parameters():
            parameter.data = more(parameter, 0, 2)


class Convolution(Grows):
    """A convolution with more output channels."""

    axis = 1

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv1d(2, 3, 3, padding=1)

    def grow(self) -> None:
        wider = nn.Conv1d(2, self.head.out_channels + 2, 3, padding=1)
        wider.weight.data, wider.bias.data = more(self.head.weight, 0, 2), more(self.head.bias, 0, 2)
        self.head = wider

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs).view(-1, 2, 8))


class Transposed(Convolution):
    """A transposed convolution with more output channels, which lie on the second axis of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ConvTranspose1d(2, 3, 3)

    def grow(self) -> None:
        wider = nn.ConvTranspose1d(2, self.head.out_channels + 2, 3)
        wider.weight.data, wider.bias.data = more(self.head.weight, 1, 2), more(self.head.bias, 0, 2)
        self.head = wider


class Product(Grows):
    """A parameter used as `x @ P`, with more columns."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(16, 3) / 4)

    def grow(self) -> None:
        self.head = nn.Parameter(more(self.head, 1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs) @ self.head


class Experts(Grows):
    """One matrix a group, with more groups."""

    axis = 0

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(2, 16, 3) / 4)

    def grow(self) -> None:
        self.head = nn.Parameter(more(self.head, 0, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs)
        return torch.bmm(features.expand(len(self.head), *features.shape), self.head)


class Tokens(Grows):
    """A token table with a classifier of its own, both with more rows."""

    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 12)
        self.head = nn.Linear(16 if not self.tied else 12, 9, bias=False)
        if self.tied:
            self.mix = nn.Linear(16, 12)
            self.head.weight = self.table.weight
        self.old, self.new = torch.tensor([[0, 3], [4, 5]]), torch.randint(2, 9, (24, 2))

    def grow(self) -> None:
        self.table.weight.data = more(self.table.weight, 0, 2)
        if not self.tied:
            self.head.weight.data = more(self.head.weight, 0, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(self.table(inputs).sum(1))
        return self.head(self.mix(features) if self.tied else features)


class Tied(Tokens):
    """A token table that is the classifier as well."""

    tied = True


class Features(Grows):
    """A classifier over more features, which are zero for the old task."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.extra = 0

    def grow(self) -> None:
        self.extra += 4
        wider = nn.Linear(16 + self.extra, 3)
        wider.weight.data, wider.bias.data = more(self.head.weight, 1, 4), self.head.bias.data.clone()
        self.head, self.old = wider, F.pad(self.old, (0, 4))
        self.new = torch.cat([self.new, torch.randn(len(self.new), 4)], 1)

    def forward(self, inputs: Tensor) -> Tensor:
        known = torch.cat([self.features(inputs[:, :12]), inputs[:, 12 : 12 + self.extra]], 1)
        return self.head(F.pad(known, (0, self.head.in_features - known.shape[1])))


KINDS = [Replaced, InPlace, Convolution, Transposed, Product, Experts, Tokens, Tied, Features]
BASES: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=3e-2, momentum=0.9, weight_decay=1e-2),
}


def wrap(model: nn.Module, base: str = "adamw", **options: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(BASES[base](model.parameters()), model, **{"policy": NumericalRank(), **options})


def follow(optimizer: NullSpaceOptimizer, model: nn.Module) -> None:
    """Give the optimizer what the model holds now; state of tensors that were exchanged is dropped."""
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.state.clear()


def learn(optimizer: Optimizer, model: Any, steps: int = 25) -> tuple[float, float]:
    """Pull all outputs of the new inputs towards 1; return the loss before and after."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(model.new) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses[0], losses[-1]


def part(outputs: Tensor, like: Tensor) -> Tensor:
    return outputs[tuple(slice(size) for size in like.shape)]


@pytest.mark.fault(121)
@pytest.mark.parametrize("bias", ["freeze", "joint"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_old_outputs_stay_while_a_weight_grows_twice(kind: type[Any], base: str, bias: str) -> None:
    model = kind()
    optimizer = wrap(model, base, bias=bias)
    optimizer.consolidate([model.old], name="old", progress=False)
    first = model(model.old).detach()
    model.grow()
    follow(optimizer, model)
    assert relative_drift(part(model(model.old), first), first) < 1e-6
    start, end = learn(optimizer, model)
    assert end < 0.9 * start
    assert relative_drift(part(model(model.old), first), first) < 1e-5
    second_task = model.new[:2]
    optimizer.consolidate([second_task], name="second", progress=False)
    second, whole = model(second_task).detach(), model(model.old).detach()
    start, end = learn(optimizer, model)
    assert end < start
    if kind is not Experts:  # a new group keeps what it has seen
        assert relative_drift(model(model.old), whole) < 1e-5
    assert relative_drift(part(model(model.old), first), first) < 1e-5
    assert relative_drift(model(second_task), second) < 1e-5
    model.grow()
    follow(optimizer, model)
    if kind is Features:
        second_task = F.pad(second_task, (0, 4))
    learn(optimizer, model)
    assert relative_drift(part(model(second_task), second), second) < 1e-5
    assert relative_drift(part(model(model.old), first), first) < 1e-5
    report = optimizer.verify(None if kind is Features else [model.old, second_task])
    assert report.ok and report.worst < 1e-5
    assert kind is Features or max(report.drift(task) for task in ("old", "second")) < 1e-5


class Split(Grows):
    """The classifier of `Replaced`, grown once, in two layers: the slow twin."""

    def __init__(self, model: Replaced) -> None:
        super().__init__()
        self.body, self.old, self.new = copy.deepcopy(model.body), model.old, model.new
        self.heads = nn.ModuleList([copy.deepcopy(model.head)])

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs)
        return torch.cat([head(features) for head in self.heads], -1)


@pytest.mark.fault(121)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options",
    [
        {"project": project, "bias": bias, "policy": policy}
        for project in ("update", "gradient", "both")
        for bias in ("freeze", "joint")
        for policy in (NumericalRank(), SGP(0.9, alpha=5), TRGP(0.9), Energy(0.8))
    ]
    + [{"precision": "fast"}, {"precision": "fast", "bias": "joint"}],
    ids=lambda options: " ".join(str(value).split("(")[0] for value in options.values()),
)
def test_a_grown_head_trains_as_an_old_and_a_new_head_side_by_side(options: dict[str, Any], base: str) -> None:
    model = Replaced().double()
    model.old, model.new = torch.randn(9, 12).double(), model.new.double()
    optimizer = wrap(model, base, **options)
    twin = Split(model)
    other = wrap(twin, base, **options)
    for one, mine in ((optimizer, model), (other, twin)):
        one.consolidate([model.old], progress=False)
        learn(one, mine, 3)
    model.grow()
    model.head.double()
    model.head.weight.data[:3], model.head.bias.data[:3] = twin.heads[0].weight.data, twin.heads[0].bias.data
    added = nn.Linear(16, 2).double()
    added.weight.data, added.bias.data = model.head.weight.data[3:].clone(), model.head.bias.data[3:].clone()
    twin.heads.append(added)
    for one, mine in ((optimizer, model), (other, twin)):
        follow(one, mine)
        assert one.verify().ok or options.get("project") == "gradient"  # hooks on gradients are those of new tensors
        learn(one, mine, 20)
    limit = 1e-7 if "precision" in options else 1e-9
    assert relative_drift(model(model.new), twin(model.new)) < limit
    assert relative_drift(model(model.old), twin(model.old)) < limit


@pytest.mark.fault(121)
@pytest.mark.parametrize("how", ["wider", "side by side"])
def test_a_wider_output_is_not_drift_of_the_old_one(how: str) -> None:
    model: Any = Replaced()
    if how == "side by side":
        model = Split(model)
    optimizer = wrap(model)
    optimizer.consolidate([model.old], name="old", progress=False)
    if how == "wider":
        model.grow()
    else:
        model.heads.append(nn.Linear(16, 2))
    follow(optimizer, model)
    learn(optimizer, model)
    report = optimizer.verify([model.old])
    assert report.ok and report.drift("old") < 1e-5 and report.first_break("old") is None
    later = optimizer.consolidate([model.new[:2]], progress=False)
    assert later.drift["old"] < 1e-5


@pytest.mark.fault(121)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Replaced, InPlace])
def test_other_precisions_keep_the_old_rows_up_to_their_rounding(kind: type[Any], dtype: torch.dtype) -> None:
    model = kind().to(dtype)
    model.old, model.new = model.old.to(dtype), model.new.to(dtype)
    optimizer = wrap(model, "sgd")
    optimizer.consolidate([model.old], progress=False)
    before = model(model.old).detach()
    model.grow()
    model.to(dtype)
    follow(optimizer, model)
    start, end = learn(optimizer, model)
    assert end < start and optimizer.verify().ok
    assert relative_drift(model(model.old)[:, :3], before) < (1e-6 if dtype == torch.float64 else 2e-2)


@pytest.mark.fault(121)
@pytest.mark.parametrize("kind", [Replaced, InPlace, Product, Tied, Features])
def test_a_full_weight_keeps_its_values_and_learns_in_new_ones(kind: type[Any]) -> None:
    model = kind()
    model.old = torch.randint(0, 9, (40, 2)) if kind is Tied else torch.randn(40, 12)
    optimizer = wrap(model)
    optimizer.consolidate([model.old], progress=False)
    weights = [name for name, basis in optimizer.bases.items() if basis.fate.value == "full"]
    assert weights
    before = model(model.old).detach()
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name in ("second", "third"):
        model.grow()
        follow(optimizer, model)
        learn(optimizer, model)
        for key, value in model.named_parameters():
            old = kept[key]
            assert key not in weights or torch.equal(part(value, old), old)
            assert value.shape == old.shape or not torch.equal(value.detach(), F.pad(old, _padding(old, value)))
        assert relative_drift(part(model(model.old), before), before) < 1e-5
        optimizer.consolidate([model.new[:20]], name=name, progress=False)
        whole = model(model.new[:20]).detach()
        learn(optimizer, model)
        assert relative_drift(model(model.new[:20]), whole) < 1e-5
        assert relative_drift(part(model(model.old), before), before) < 1e-5
        if kind is Features:
            break
    assert optimizer.verify().ok


def _padding(old: Tensor, new: Tensor) -> list[int]:
    return [n for was, now in zip(reversed(old.shape), reversed(new.shape)) for n in (0, now - was)]


@pytest.mark.fault(121)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_a_convolution_are_added_or_the_weight_is_frozen(groups: int) -> None:
    old, wide = nn.Conv1d(4, 4, 3, groups=groups), nn.Conv1d(4, 8, 3, groups=groups)
    if groups > 1:
        wide = nn.Conv1d(8, 8, 3, groups=2 * groups)
    model = nn.Sequential(old)
    inputs, later = torch.randn(1, 4, 4), torch.randn(1, 8 if groups > 1 else 4, 4)
    optimizer = wrap(model)
    optimizer.consolidate([inputs], progress=False)
    wide.weight.data[:4], wide.bias.data[:4] = old.weight.data, old.bias.data
    model[0] = wide
    follow(optimizer, model)
    again = F.pad(inputs, (0, 0, 0, later.shape[1] - 4))
    before = model(again).detach()[:, :4]

    def step() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            (model(torch.randn(6, later.shape[1], 5)) - 1).square().mean().backward()
            optimizer.step()

    step()
    assert relative_drift(model(again)[:, :4], before) < 1e-5
    report = optimizer.consolidate([later], progress=False)
    assert (groups > 1) == any("no longer runs its samples" in note for note in report.notes)
    assert optimizer.bases["0.weight"].fate.value != "frozen"
    assert optimizer.bases["0.weight"].layout.groups == (1 if groups == 1 else 2 * groups)
    second = model(later).detach()
    step()
    assert relative_drift(model(again)[:, :4], before) < 1e-5 and relative_drift(model(later), second) < 1e-5


@pytest.mark.fault(122)
@pytest.mark.parametrize("kind", [Replaced, InPlace])
def test_growth_is_said_in_one_line_and_once(kind: type[Any], recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    model = kind()
    optimizer = wrap(model)
    optimizer.consolidate([model.old], progress=False)
    model.grow()
    follow(optimizer, model)
    recwarn.clear()
    with pytest.warns(NullSpaceWarning, match=r"'head\.weight' has grown from 3 to 5 rows: its first 3 rows stay kept"):
        learn(optimizer, model, 1)
    recwarn.clear()
    learn(optimizer, model, 3)
    optimizer.verify([model.old])
    optimizer.save(tmp_path / "bases.safetensors")
    model.head.weight.data = model.head.weight.data.clone()
    learn(optimizer, model, 1)
    assert not recwarn.list


@pytest.mark.fault(122)
@pytest.mark.parametrize("kind", [Replaced, InPlace])
def test_other_values_in_front_are_refused_until_released(kind: type[Any]) -> None:
    model = kind()
    optimizer = wrap(model)
    optimizer.consolidate([model.old], progress=False)
    features = model.features(model.old).detach()
    model.grow()
    model.head.weight.data = model.head.weight.data.flip(0)
    follow(optimizer, model)
    before = model.head.weight.detach().clone()
    message = r"'head\.weight' is \(5, 16\), its basis was made for \(3, 16\).*release\('head\.weight'\)"
    for use in (lambda: learn(optimizer, model, 1), lambda: optimizer.consolidate([model.new], progress=False)):
        with pytest.raises(ShapeError, match=message):
            use()
    assert torch.equal(model.head.weight, before)
    optimizer.release("head.weight")
    learn(optimizer, model)
    assert relative_drift(model.features(model.old), features) < 1e-5


@pytest.mark.fault(26, 122)
@pytest.mark.parametrize("shape", [(2, 16), (3, 15), (3, 4, 4)])
def test_a_weight_that_shrank_is_named(shape: tuple[int, ...]) -> None:
    model = Replaced()
    optimizer = wrap(model)
    optimizer.consolidate([model.old], progress=False)
    model.head.weight.data = torch.zeros(shape)
    for use in (optimizer.step, optimizer.verify, optimizer.reanchor, lambda: optimizer.consolidate([model.old])):
        with pytest.raises(ShapeError, match=r"'head\.weight' is .*made for \(3, 16\)"):
            use()
