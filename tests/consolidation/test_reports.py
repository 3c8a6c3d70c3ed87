"""Reports say what was not seen, what cannot learn, and how a batch was read; one line a kind."""

from __future__ import annotations

import copy
import json
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from nullspace_optim import Energy, NullSpaceOptimizer, NullSpaceWarning, NumericalRank

pytestmark = pytest.mark.filterwarnings("ignore")


def wrap(model: nn.Module, policy: Any = None, lr: float = 1e-2, **options: Any) -> NullSpaceOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=lr)
    optimizer = NullSpaceOptimizer(base, model, policy=policy or NumericalRank(), **options)
    optimizer.kept_alive = model
    return optimizer


def mlp(inputs: int = 24, outputs: int = 40) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs))


def test_a_later_task_that_reads_no_trained_weight_warns_like_a_first_one() -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([torch.randn(4, 24)], progress=False)
    copied = copy.deepcopy(model)
    with pytest.warns(NullSpaceWarning, match="nothing of 'task 2' is protected"):
        report = optimizer.consolidate([torch.randn(4, 24)], forward=copied, progress=False)
    assert report.met == () and "4 of 4 not read by this task" in str(report)


class Towers(nn.Module):
    """Two towers as CLIP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(24, 40), nn.Linear(24, 40)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.image(x) if y is None else self.image(x) @ self.text(y).T


def test_one_tower_alone_is_announced_for_every_task() -> None:
    optimizer = wrap(Towers())
    optimizer.consolidate(
        [torch.randn(4, 24)], forward=lambda x: optimizer.model(x, torch.randn(4, 24)), progress=False
    )
    with pytest.warns(NullSpaceWarning, match="only one tower was run: 2 parameters were not read by 'task 2'"):
        optimizer.consolidate([torch.randn(4, 24)], progress=False)


DATA = TensorDataset(torch.randn(20, 24), torch.zeros(20))


@pytest.mark.parametrize(
    ("loader", "note"),
    [
        (DataLoader(DATA, 8), None),
        (DataLoader(DATA, 8, drop_last=True), "16 of the 20 samples"),
        (DataLoader(DATA, 8, sampler=WeightedRandomSampler(torch.ones(20), 20)), "with replacement"),
        ([torch.randn(8, 24)], None),
    ],
    ids=["whole", "drop_last", "weighted", "list"],
)
def test_samples_that_were_not_seen_are_told(loader: Any, note: str | None) -> None:
    report = wrap(mlp()).consolidate(loader, progress=False)
    told = [text for text in report.notes if ("samples" in text and "seen" in text) or "replacement" in text]
    assert len(told) == (note is not None)
    assert note is None or note in told[0]
    assert report.samples == sum(len(b[0]) if isinstance(b, list) else len(b) for b in loader)


class Named(nn.Module):
    """Takes inputs and task labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(24, 40)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.body(x) + task_labels[:, None]


X, Y = torch.randn(6, 24), torch.arange(6)


@pytest.mark.parametrize(
    ("model", "batch", "guess", "fed"),
    [
        (mlp(), (X, Y), None, "float32 [6, 24]"),
        (mlp(), {"input": X}, None, "input=float32 [6, 24]"),
        (Named(), (X, Y), None, "float32 [6, 24], int64 [6]"),
        (Named(), (X, Y, Y), "2 of 3 items", "float32 [6, 24], int64 [6]"),
        (mlp(), ([X, X + 1], Y), "the first of 2 tensors in the batch's first item", "float32 [6, 24]"),
        (mlp(), [X, X + 1, X + 2], "the first of 3 tensors of the batch", "float32 [6, 24]"),
    ],
)
def test_a_guess_about_a_batch_is_told(model: nn.Module, batch: Any, guess: str | None, fed: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = wrap(model).consolidate([batch], progress=False)
    told = [str(w.message) for w in caught if "how the batch is read is a guess" in str(w.message)]
    assert report.fed == fed and len(told) == (guess is not None)
    assert guess is None or guess in told[0]


def test_forward_decides_and_nothing_is_guessed() -> None:
    report = wrap(mlp()).consolidate([(X, Y, Y)], forward=lambda b: None, progress=False)
    assert report.fed == "the whole batch, to forward=" and not any("guess" in w for w in report.warnings)


class Lstm(nn.Module):
    """Read by a kernel that cannot be protected."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0][:, -1])


def test_frozen_numbers_above_one_half_are_a_warning_that_says_why() -> None:
    report = wrap(Lstm()).consolidate([torch.randn(2, 5, 8)], progress=False)
    total = sum(p.numel() for p in Lstm().parameters())
    frozen = total - 16 * 3
    assert report.still_share == pytest.approx(frozen / total)
    (told,) = [text for text in report.warnings if "of the trained numbers are frozen" in text]
    assert told.startswith("97%") and "rnn" in told
    assert not any("trained numbers" in w for w in wrap(mlp()).consolidate([X], progress=False).warnings)


def test_frozen_rows_of_a_table_count_as_frozen_numbers() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(16, 3, bias=False))
    report = wrap(model).consolidate([torch.tensor([[1, 2], [3, 4], [5, 6], [7, 1]])], progress=False)
    assert report.still_share == pytest.approx(7 * 8 / (80 + 48))


def test_one_massive_direction_is_a_warning() -> None:
    rows = torch.stack([1e4 + torch.randn(200), *(torch.randn(200) for _ in range(9))], 1)
    model = nn.Linear(10, 4)
    (told,) = [w for w in wrap(model, Energy()).consolidate([rows], progress=False).warnings if "one direction" in w]
    assert "'weight'" in told and "NumericalRank" in told
    for policy, x in ((NumericalRank(), rows), (Energy(), rows[:, 1:].repeat(1, 2)[:, :10])):
        assert not any("one direction" in w for w in wrap(model, policy).consolidate([x], progress=False).warnings)


def test_a_closed_gate_is_told() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.a, self.o = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.g = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.i(x))
            return self.o(x + self.g * torch.tanh(self.a(x)))

    report = wrap(Gate()).consolidate([torch.randn(4, 12)], progress=False)
    (told,) = [w for w in report.warnings if "all zero and frozen" in w]
    assert "'g'" in told and "release()" in told


def test_a_rank_of_zero_everywhere_is_a_warning() -> None:
    report = wrap(mlp()).consolidate([torch.zeros(4, 24)], progress=False)
    assert any("rank" in w or "counts" in w for w in report.warnings) or report.parameters[2].rank > 0


def test_warnings_of_one_kind_are_one_line_with_ways_out() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = wrap(model).consolidate([torch.randn(64, 16)], progress=False)
    texts = [str(w.message) for w in caught if issubclass(w.category, NullSpaceWarning)]
    full = [text for text in texts if "weights have no free direction" in text]
    assert len(full) == 1 and re.match(r"\d+ weights", full[0]) and full[0].count("'") == 6 + 1
    assert all(word in full[0] for word in ("threshold", "prune()", "release()"))
    assert len(str(report).splitlines()) <= 40
    again = wrap(model)
    again.consolidate([torch.randn(64, 16)], progress=False)
    assert not any(
        "weights have no free" in w for w in again.consolidate([torch.randn(8, 16)], progress=False).warnings
    )


def test_a_long_report_fits_a_screen_and_its_table_names_everything() -> None:
    model = nn.Sequential(*[layer for _ in range(40) for layer in (nn.Linear(16, 16), nn.LayerNorm(16))])
    report = wrap(model).consolidate([torch.randn(4, 16)], progress=False)
    assert len(str(report).splitlines()) <= 40
    assert all(name in report.table() for name, _ in model.named_parameters())
    assert all(name in report._repr_html_() for name, _ in model.named_parameters())
    plain = json.loads(json.dumps(report.to_dict()))
    assert [p["name"] for p in plain["parameters"]] == [name for name, _ in model.named_parameters()]
    assert plain["fates"]["frozen"] == len(report.parameters) - len(model) // 2


def test_capacity_leaves_frozen_zeros_out_of_its_mean() -> None:
    model = nn.Sequential(nn.Embedding(50, 24), nn.LayerNorm(24), nn.Linear(24, 30), nn.LayerNorm(30))
    optimizer = wrap(model)
    optimizer.consolidate([torch.randint(0, 50, (6,))], progress=False)
    capacity = optimizer.capacity()
    assert capacity["1.weight"] == 0.0
    assert capacity.mean == pytest.approx(capacity["2.weight"]) and "'2.weight'" in repr(capacity)
    assert "rank" not in repr(optimizer.bases) and "1 tasks" in repr(optimizer.bases)
    assert "tensor(" not in repr(optimizer.bases["2.weight"])
