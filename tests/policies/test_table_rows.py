"""Which rows of a token table a task keeps: by how many of its samples read them."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nullspace_optim import Energy, FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.capture.capture import Capture
from nullspace_optim.covariance.accumulator import StatisticsAccumulator
from nullspace_optim.covariance.all_reduce import _summarised, _united
from nullspace_optim.errors import ConsolidationError
from nullspace_optim.settings import Settings


class Words(nn.Module):
    """A head over the mean of looked-up rows."""

    def __init__(self, number: int = 40):
        super().__init__()
        self.table, self.head = nn.Embedding(number, 8), nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


def zipf(samples: int, number: int, seed: int, length: int = 6) -> torch.Tensor:
    """Tokens `[samples, length]` of which the first are read most."""
    chances = 1 / torch.arange(1, number + 1).float() ** 1.5
    return torch.multinomial(
        chances.expand(samples, number), length, replacement=True, generator=torch.Generator().manual_seed(seed)
    )


def chosen_by_hand(counts: list[int], kept: set[int], threshold: float) -> set[int]:
    """Add the most read rows, those of equal counts together, until their share of all reads is reached."""
    found = set(kept)
    while sum(counts[row] for row in found) < threshold * sum(counts):
        most = max(count for row, count in enumerate(counts) if row not in found)
        found |= {row for row, count in enumerate(counts) if count == most}
    return found - kept


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(6))
def test_the_most_read_rows_are_taken_until_the_threshold(threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = (torch.rand(50, generator=generator) ** 6 * 30).long()
    kept = torch.rand(50, generator=generator) < 0.1 * seed
    mask = Energy(threshold).rows(counts, kept)
    assert set(mask.nonzero().flatten().tolist()) == chosen_by_hand(
        counts.tolist(), set(kept.nonzero().flatten().tolist()), threshold
    )


def test_rows_read_equally_often_are_kept_alike():
    assert Energy(0.5).rows(torch.full((1024,), 3), torch.zeros(1024, dtype=torch.bool)).all()


def test_rules_without_a_share_keep_every_row_that_was_read():
    tokens = zipf(64, 40, 0)
    for policy in (NumericalRank(), FixedRank(2)):
        model = Words()
        optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=policy)
        optimizer.consolidate([tokens], progress=False)
        assert optimizer.bases["table.weight"].subspaces["rows"].basis.tolist() == tokens.unique().tolist()


def test_a_row_counts_once_a_sample_so_padding_does_not_outweigh_words():
    words = torch.arange(1, 21).repeat(2).view(40, 1)
    tokens = torch.cat([words, torch.zeros(40, 30, dtype=torch.int64)], dim=1)  # 97 % padding
    model = Words()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=Energy(0.9))
    optimizer.consolidate([tokens], progress=False)
    assert optimizer.bases["table.weight"].subspaces["rows"].rank == 21


class Reader(nn.Module):
    """A head over rows of a table `[40, 8]` that `read(table, tokens)` looks up for samples `[samples, length]`."""

    def __init__(self, read):
        super().__init__()
        self.table, self.head, self.read = nn.Embedding(40, 8), nn.Linear(8, 4), read

    def forward(self, tokens):
        return self.head(self.read(self.table.weight, tokens))


def bags(tokens):
    return torch.arange(0, tokens.numel(), tokens.shape[1])


def ragged(weight, tokens):
    """Bags of tokens `[samples, length]` without the padding, and an empty one at the end."""
    index = torch.cat([row[row > 0] for row in tokens])
    sizes = (tokens > 0).sum(1)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return F.embedding_bag(index.int(), weight, offsets.int())[:-1]


READERS = {
    "flattened": lambda w, t: F.embedding(t.reshape(-1), w).view(*t.shape, -1).mean(1),
    "time first": lambda w, t: F.embedding(t.T, w).mean(0),
    "step by step": lambda w, t: torch.stack([F.embedding(step, w) for step in t.T]).mean(0),
    "twice": lambda w, t: (F.embedding(t, w) + F.embedding(t.flip(1), w)).mean(1),
    "characters": lambda w, t: F.embedding(t.unflatten(1, (-1, 2)), w).mean((1, 2)),
    "bags": lambda w, t: F.embedding_bag(t, w, mode="max"),
    "bags by offsets": lambda w, t: F.embedding_bag(t.reshape(-1), w, bags(t), mode="sum"),
    "bags with the last offset": lambda w, t: F.embedding_bag(
        t.reshape(-1), w, torch.cat([bags(t), torch.tensor([t.numel()])]), include_last_offset=True
    ),
}


@pytest.mark.parametrize(
    "index",
    [
        torch.arange(6),
        torch.arange(6)[None],
        torch.arange(6).expand(8, 6),
        torch.arange(6)[:, None],
        (torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0),
    ],
    ids=["positions", "one row", "expanded", "one column", "distances"],
)
def test_rows_that_every_sample_reads_are_kept_alike(index):
    model = Reader(lambda weight, tokens: F.embedding(index, weight).flatten(0, -2).mean(0) + tokens[:, :1])
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=Energy(0.6))
    optimizer.consolidate([torch.ones(8, 3)], progress=False)
    kept = optimizer.bases["table.weight"].subspaces["rows"]
    assert kept.basis.tolist() == [0, 1, 2, 3, 4, 5] and kept.energy == 1.0


@pytest.mark.parametrize("rows", ["all", "relevant"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_row_counts_once_a_sample_however_the_table_is_read(read, rows):
    words = torch.arange(1, 21).repeat(2).view(40, 1)
    tokens = torch.cat([words, torch.zeros(40, 31, dtype=torch.int64)], dim=1)
    model = Reader(read)
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=Energy(0.9), rows=rows)
    optimizer.consolidate([tokens[:25], tokens[25:]], progress=False)
    kept = optimizer.bases["table.weight"].subspaces["rows"]
    assert kept.rank == 21 and kept.energy == 1.0
    expected = torch.tensor([40] + 20 * [2] + 19 * [0])
    assert torch.equal(counted(model, [tokens[:25], tokens[25:]]), expected)


def counted(model, batches):
    """Samples `[40]` that looked each row of the table up."""
    watch = Capture(dict(model.named_parameters()), Settings(rows="all"))
    with watch:
        for batch in batches:
            watch.batch(lambda batch=batch: model(batch), samples=len(batch))
    return watch.captured["table.weight"].row_counts


@pytest.mark.parametrize(
    "read", [lambda w, t: F.embedding_bag(t, w, padding_idx=0), ragged], ids=["padding_idx", "ragged"]
)
def test_padding_that_a_bag_leaves_out_is_not_counted(read):
    words = torch.arange(1, 21).repeat(2).view(40, 1)
    tokens = torch.cat([words, torch.zeros(40, 31, dtype=torch.int64)], dim=1)
    tokens[:10, 1:4] = words[:10]
    expected = torch.tensor([0] + 20 * [2] + 19 * [0])
    assert torch.equal(counted(Reader(read), [tokens]), expected)


def test_a_run_that_failed_counts_no_look_up():
    model, tokens = Words(), torch.tensor([[1, 2], [2, 3]])

    def fail():
        model(tokens)
        raise ValueError

    watch = Capture(dict(model.named_parameters()), Settings(rows="all"))
    with watch:
        watch.batch(lambda: model(tokens), samples=2)
        with pytest.raises(ValueError):
            watch.batch(fail, samples=2)
        watch.batch(lambda: model(tokens), samples=2)
    assert watch.captured["table.weight"].row_counts[:5].tolist() == [0, 2, 4, 2, 0]


def test_kept_rows_stay_bitwise_and_rare_ones_train():
    torch.manual_seed(0)
    model, tokens = Words(), zipf(200, 40, 1)
    optimizer = NullSpaceOptimizer(torch.optim.AdamW(model.parameters(), 0.1), policy=Energy(0.8))
    report = optimizer.consolidate([tokens[:100], tokens[100:]], progress=False)
    counts = torch.stack([torch.bincount(row.unique(), minlength=40) for row in tokens]).sum(0)
    rows = optimizer.bases["table.weight"].subspaces["rows"]
    assert set(rows.basis.tolist()) == chosen_by_hand(counts.tolist(), set(), 0.8)
    line = next(row for row in report.parameters if row.name == "table.weight")
    assert line.energy == pytest.approx(float(counts[rows.basis].sum() / counts.sum()))
    before = model.table.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(zipf(64, 40, 2)).square().sum().backward()
        optimizer.step()
    moved = (model.table.weight.detach() != before).any(1)
    assert not moved[rows.basis].any() and moved[counts > 0].any()
    optimizer.consolidate([tokens], progress=False)  # nothing is missing
    assert torch.equal(optimizer.bases["table.weight"].subspaces["rows"].basis, rows.basis)


@dataclass(frozen=True)
class Often(Energy):
    """Keeps rows that at least three samples read, as an index where a mask is asked for."""

    mask: bool = True

    def rows(self, counts, kept):
        return counts >= 3 if self.mask else (counts >= 3).nonzero()[:, 0]


def test_a_rule_of_ones_own_gives_a_mask():
    tokens, model = zipf(64, 40, 0), Words()
    wrong = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=Often(mask=False))
    with pytest.raises(ConsolidationError, match=r"Often.rows\(\) returned torch.int64 \[\d+\], expected a mask"):
        wrong.consolidate([tokens], progress=False)
    assert not wrong.bases
    wrong.detach()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), 0.1), policy=Often())
    optimizer.consolidate([tokens], progress=False)
    counts = torch.stack([torch.bincount(row.unique(), minlength=40) for row in tokens]).sum(0)
    assert optimizer.bases["table.weight"].subspaces["rows"].basis.tolist() == (counts >= 3).nonzero()[:, 0].tolist()


def test_an_empty_table_keeps_nothing():
    assert Energy().rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)).tolist() == []


def test_counts_of_all_ranks_are_added():
    told = []
    for index in ([[0, 1], [1, 1]], [[1, 2]]):
        tally = StatisticsAccumulator(dtype=torch.float32, batch_frobenius=False, statistics=True)
        tally.look_up("table", torch.tensor(index), 4, torch.arange(len(index))[:, None])
        tally.end_batch(0)
        told.append(_summarised(tally)[0])
    assert _united(told).looked_up["table"].tolist() == [1, 3, 1, 0]
