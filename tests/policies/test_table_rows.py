"""Which rows of a token table a task keeps: by how many of its samples read them."""

import pytest
import torch
from torch import nn

from nullspace_optim import Energy, FixedRank, NullSpaceOptimizer, NumericalRank
from nullspace_optim.covariance.accumulator import StatisticsAccumulator
from nullspace_optim.covariance.all_reduce import _summarised, _united


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


def test_counts_of_all_ranks_are_added():
    told = []
    for index in ([[0, 1], [1, 1]], [[1, 2]]):
        tally = StatisticsAccumulator(dtype=torch.float32, batch_frobenius=False, statistics=True)
        tally.look_up("table", torch.tensor(index), 4)
        told.append(_summarised(tally)[0])
    assert _united(told).looked_up["table"].tolist() == [1, 3, 1, 0]
