"""Finding the model among live objects, and feeding it batches of every kind."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank, clip_forward
from nullspace_optim.errors import BatchError, ModelNotFoundError

ROWS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """A model whose forward names its inputs: `pixels` `[n, 12]`, optionally `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.layer(pixels) * scale + self.shift
        return result


@dataclasses.dataclass
class Batch:
    """A batch as some collate functions return it."""

    pixels: Tensor
    labels: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like `transformers.BatchEncoding`."""


Pair = namedtuple("Pair", ["pixels", "labels"])
LABELS = torch.arange(5)
BATCHES: dict[str, Any] = {
    "tensor": ROWS,
    "tuple": (ROWS, LABELS),
    "list": [ROWS, LABELS],
    "dict": {"pixels": ROWS, "labels": LABELS},
    "ordered-dict": OrderedDict(labels=LABELS, pixels=ROWS),
    "namedtuple": Pair(ROWS, LABELS),
    "dataclass": Batch(ROWS, LABELS),
    "encoding": Encoding(pixels=ROWS, labels=LABELS),
    "nested": ((ROWS, LABELS), ["a", "b"]),
    "dict-and-label": ({"pixels": ROWS}, LABELS),
    "with-text": (ROWS, ["a", "b", "c", "d", "e"]),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.fault(51, 52)
def test_batches_of_every_kind_reach_the_model(kind: str) -> None:
    model = Named()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()), policy=NumericalRank())
    report = optimizer.consolidate([BATCHES[kind]], progress=False)
    basis = optimizer.bases["layer.weight"]
    assert (basis.rank, report.batches) == (5, 1)
    assert torch.allclose(basis.U @ (basis.U.T @ ROWS.T), ROWS.T, atol=1e-5)
    assert optimizer.verify([BATCHES[kind]]).drift("task 1") == 0.0
    other = copy.deepcopy(BATCHES[kind])
    for leaf in [other.pixels] if kind == "dataclass" else [other["pixels"]] if kind == "encoding" else []:
        leaf.add_(1)
        assert optimizer.verify([other]).missing == ("task 1",)


@pytest.mark.fault(51)
def test_a_batch_encoding_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = Named()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()))
    optimizer.consolidate([transformers.BatchEncoding({"pixels": ROWS, "token_type_ids": LABELS})], progress=False)
    assert optimizer.bases["layer.weight"].rank == 5


@pytest.mark.fault(52, 70)
def test_two_required_inputs_take_two_items() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 4), nn.Linear(6, 4)

        def forward(self, a: Tensor, b: Tensor, c: float = 0.0) -> Tensor:
            return self.one(a) + self.two(b)

    model = Two()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()))
    optimizer.consolidate([(ROWS, torch.randn(5, 6), LABELS)], progress=False)
    assert optimizer.bases["two.weight"].fate is Fate.PROTECTED


@pytest.mark.fault(73)
def test_forward_decides_alone() -> None:
    model = Named()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()), policy=NumericalRank())
    optimizer.consolidate(["any text"], forward=lambda batch: model(ROWS[: len(batch) - 6]), progress=False)
    assert optimizer.bases["layer.weight"].rank == 2


@pytest.mark.parametrize("batch", [3, "text", None, {"images": ROWS}, []], ids=repr)
@pytest.mark.fault(51)
def test_a_batch_that_cannot_be_fed_asks_for_forward(batch: Any) -> None:
    model = Named()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()))
    with pytest.raises(BatchError, match="forward="):
        optimizer.consolidate([batch], progress=False)
    assert not optimizer.bases


def test_a_mapping_without_a_required_input_asks_for_forward() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, rows: Tensor, scale: float = 1.0, **others: Any) -> Tensor:
            return self.layer(rows) * scale

    model = Open()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()))
    with pytest.raises(BatchError, match=r"keys \['images'\], the model's forward needs \['rows'\]; pass forward="):
        optimizer.consolidate([{"images": ROWS}], progress=False)
    optimizer.consolidate([{"rows": ROWS, "labels": LABELS}], progress=False)
    assert optimizer.bases["layer.weight"].fate is Fate.PROTECTED


def test_the_smallest_owner_is_found_before_and_after_training() -> None:
    inner = Named()
    outer = nn.ModuleDict({"student": inner, "teacher": copy.deepcopy(inner)})
    assert NullSpaceOptimizer(SGD(inner.parameters())).model is inner
    assert NullSpaceOptimizer(SGD(outer.parameters())).model is outer
    assert NullSpaceOptimizer(SGD([inner.layer.weight, outer["teacher"].layer.bias])).model is outer


def test_a_container_without_a_forward_is_not_taken_for_the_model() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 6)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Listed()
    assert NullSpaceOptimizer(SGD(model.parameters())).model is model


def test_the_outermost_of_nested_owners_decides_what_the_inner_one_sees() -> None:
    class Normalised(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - 3.0) / 0.5)  # type: ignore[no-any-return]

    outer = Normalised(nn.Linear(12, 6, bias=False))
    optimizer = NullSpaceOptimizer(SGD(outer.parameters(), lr=1e-3), policy=NumericalRank())
    assert optimizer.model is outer
    rows = torch.randn(4, 12) + 3.0
    optimizer.consolidate([rows], progress=False)
    before = outer(rows).detach()
    for _ in range(5):
        optimizer.zero_grad()
        outer(torch.randn(64, 12)).square().mean().backward()
        optimizer.step()
    assert (outer(rows) - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_unwrapped(wrapper: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 6))
    wrapped = wrapper(model)
    assert NullSpaceOptimizer(SGD(wrapped.parameters())).model is model
    optimizer = NullSpaceOptimizer(SGD(wrapped.parameters()), wrapped)
    assert optimizer.model is model
    optimizer.consolidate([ROWS], progress=False)
    assert list(optimizer.bases) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_no_model_is_an_error_that_says_what_came_near() -> None:
    model, stray = Named(), nn.Parameter(torch.zeros(3))
    optimizer = NullSpaceOptimizer(SGD([*model.parameters(), stray]))
    with pytest.raises(ModelNotFoundError, match=r"all 4 wrapped parameters.*Named owns 3.*model="):
        optimizer.consolidate([ROWS], progress=False)
    optimizer = NullSpaceOptimizer(SGD([*model.parameters(), stray]), model)
    optimizer.consolidate([ROWS], progress=False)
    assert set(optimizer.bases) == {"layer.weight", "layer.bias", "shift"}


def test_a_tie_is_an_error_that_lists_the_candidates() -> None:
    shared = nn.Parameter(torch.randn(6, 12))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = shared

    class Other(One):
        pass

    models = [One(), Other()]
    optimizer = NullSpaceOptimizer(SGD([shared]))
    with pytest.raises(ModelNotFoundError, match=r"One.*Other|Other.*One"):
        _ = optimizer.model
    assert NullSpaceOptimizer(SGD([shared]), model=models[1]).model is models[1]


def test_the_model_is_remembered_weakly() -> None:
    model = Named()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()), model)
    optimizer.consolidate([ROWS], progress=False)
    reference = __import__("weakref").ref(model)
    del model
    gc.collect()
    assert reference() is None


def _clip() -> open_clip.CLIP:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text)


@pytest.mark.fault(71)
def test_images_alone_leave_the_text_tower_free_and_a_warning_says_so() -> None:
    model = _clip()
    optimizer = NullSpaceOptimizer(SGD(model.parameters()))
    with pytest.warns(UserWarning, match=r"only one tower.*clip_forward"):
        report = optimizer.consolidate([(torch.randn(3, 3, 16, 16), LABELS)], progress=False)
    assert "only one tower" in report.warnings[0]
    assert optimizer.bases["text_projection"].fate is Fate.FREE
    assert optimizer.bases["visual.proj"].fate is Fate.PROTECTED


def test_clip_forward_feeds_the_prompts_once_a_pass() -> None:
    model, tokens = _clip(), torch.randint(1, 64, (2, 8))
    optimizer = NullSpaceOptimizer(SGD(model.parameters()), policy=NumericalRank())
    feed = clip_forward(model, tokens)
    batches = [(torch.randn(2, 3, 16, 16), LABELS[:2]) for _ in range(3)]
    calls: list[int] = []
    model.token_embedding.register_forward_hook(lambda *_: calls.append(1))
    report = optimizer.consolidate(batches, forward=feed, progress=False)
    assert len(calls) <= 4  # the pass, the probe, and the two forwards of the drift estimate; not once a batch
    assert not report.of(Fate.FREE)
    optimizer.consolidate(batches, name="again", forward=feed, progress=False)
    assert optimizer.verify(batches, forward=feed).drift("task 1") == 0.0


def test_encode_image_loops_are_protected_as_well() -> None:
    model, tokens, old = _clip(), torch.randint(1, 64, (1, 8)), torch.randn(2, 3, 16, 16)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.05), policy=NumericalRank())
    optimizer.consolidate([old], forward=clip_forward(model, tokens), progress=False)
    with torch.no_grad():
        before, start = model.encode_image(old), model.visual.proj.clone()
    new = torch.randn(8, 3, 16, 16)
    for _ in range(30):
        optimizer.zero_grad()
        model.encode_image(new).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.encode_image(old) - before).norm() / before.norm() <= 1e-5
        assert not torch.equal(model.visual.proj, start)
