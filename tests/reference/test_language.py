"""The language study and the command for a GPU, in small."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.benchmarks import gpu
from reference.studies import language
from reference.studies.language import CONTEXT, GPT, TOKENS, fine_tuned, perplexity, rows
from reference.studies.ways import Way, chosen


def corpus(seed: int) -> dict[str, torch.Tensor]:
    """Return random tokens of a hundred kinds."""
    draw = torch.Generator().manual_seed(seed)
    return {split: torch.randint(100 * seed, 100 * seed + 100, (2000,), generator=draw) for split in language.SPLITS}


def test_rows_are_windows_of_the_stream() -> None:
    found = rows(torch.arange(500), torch.Generator().manual_seed(0), 8)
    assert found.shape == (8, CONTEXT + 1)
    assert bool((found.diff(dim=1) == 1).all()) and len(found[:, 0].unique()) > 1


WAYS = {
    **{name: language.WAYS[name] for name in ("plain, 1e-3", "distillation on old data, 5 %")},
    "ours and old data": language.WAYS["ours, Energy(0.5), and old data, 5 %"],
    "by depth": Way(1e-3, threshold=[0.5, 0.8]),
    "LoRA": Way(1e-2, rank=4),
    "OSF": Way(1e-2, rank=0.5),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_learns_and_all_the_way_back_is_the_model_before(name: str) -> None:
    if WAYS[name].rank and not hasattr(pytest.importorskip("peft"), "OSFConfig"):
        pytest.skip("this peft has no OSF")
    torch.manual_seed(0)
    before, old, new = GPT(width=32, depth=1), corpus(1), corpus(2)
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    model, interpolated, seconds, stored = fine_tuned(WAYS[name], before, old, new, 8, 0)
    assert seconds > 0 and (stored > 0) == (name != "plain, 1e-3")
    assert all(torch.equal(value, kept[key]) for key, value in before.state_dict().items())
    after, start = perplexity(model, new["test"], 1), perplexity(before, new["test"], 1)
    assert after < 0.98 * start
    assert after < perplexity(interpolated(0.5), new["test"], 1) < start
    for key, value in interpolated(1.0).state_dict().items():
        torch.testing.assert_close(value, kept[key], rtol=1e-4, atol=1e-5)
    assert perplexity(interpolated(0.0), new["test"], 1) == pytest.approx(after, rel=1e-3)


def test_a_threshold_of_each_block_is_that_of_energy() -> None:
    torch.manual_seed(0)
    model, old = GPT(width=32, depth=2), corpus(1)
    batches = [rows(old["training"], torch.Generator().manual_seed(n), 16)[:, :-1] for n in range(3)]
    ranks = {}
    for threshold in (0.5, 0.7, 0.9, [0.5, 0.9, 0.7]):
        optimizer, _ = Way(1e-3, threshold).optimizer(model, 1)
        optimizer.consolidate(batches, progress=False)
        mains = {name: basis.main for name, basis in optimizer.bases.items()}
        ranks[str(threshold)] = {name: main.rank for name, main in mains.items() if main is not None}
        optimizer.detach()
    for name, rank in ranks.pop("[0.5, 0.9, 0.7]").items():
        alone = "0.9" if "blocks.0" in name else "0.7" if "blocks.1" in name else "0.5"
        assert rank == ranks[alone][name]
    assert all(len({found[name] for found in ranks.values()}) > 1 for name in ranks["0.5"] if "qkv" in name)


def test_stored_are_bases_old_tokens_the_teacher_and_what_is_added() -> None:
    pytest.importorskip("peft")
    before, old, new = GPT(width=32, depth=1), corpus(1), corpus(2)
    tokens, weights = old["training"].nbytes, sum(4 * parameter.numel() for parameter in before.parameters())
    kept = {name: fine_tuned(way, before, old, new, 2, 0)[-1] for name, way in WAYS.items() if name != "OSF"}
    assert kept["plain, 1e-3"] == 0
    assert kept["distillation on old data, 5 %"] == tokens + weights
    assert kept["LoRA"] == 4 * 4 * sum(
        sum(w.shape) for n, w in before.named_parameters() if "blocks" in n and w.ndim > 1
    )
    alone = fine_tuned(language.WAYS["ours, Energy(0.5)"], before, old, new, 2, 0)[-1]
    assert kept["ours and old data"] == alone + tokens


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("LoRA,OSF", ["LoRA, r=8", "OSF, half kept"]),
        ("plain, 2e-3;OSF", ["plain, 2e-3", "OSF, half kept"]),
        ("plain, 2e-3;", ["plain, 2e-3"]),
        ("", [*language.WAYS]),
    ],
)
def test_ways_are_chosen_by_parts_of_their_names(parts: str, names: list[str]) -> None:
    assert [*chosen(language.WAYS, parts)] == names


def test_a_part_that_no_name_holds_is_refused() -> None:
    with pytest.raises(SystemExit, match="no way is called OFS; choose from plain, 4e-3; "):
        chosen(language.WAYS, "LoRA,OFS")


def test_perplexity_of_a_model_that_knows_nothing_is_the_number_of_tokens() -> None:
    model = GPT(width=8, depth=1)
    torch.nn.init.zeros_(model.table.weight)
    assert perplexity(model, corpus(1)["test"], 1) == pytest.approx(TOKENS, rel=1e-4)


def test_the_study_writes_its_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(language, "tokenized", lambda: (corpus(1), corpus(2)))
    figure = tmp_path / "curves.png"
    short = ["--methods", "Energy(0.95)", "--seeds", "0", "--steps", "2", "--pretraining", "2"]
    outcome = language.main([*short, "--output", str(tmp_path), "--figure", str(figure)])
    (table,) = outcome.tables
    assert [row[0] for row in table.rows] == [name for name in language.WAYS if "Energy(0.95)" in name]
    assert figure.stat().st_size > 1000
    assert json.loads((tmp_path / "language.json").read_text())["command"].startswith(
        "python -m reference.studies.language"
    )


def test_the_corpora_of_this_machine_are_tokenized_by_documents() -> None:
    pytest.importorskip("tokenizers")
    old, new = language.tokenized()
    for found in (old, new):
        assert len(found["training"]) > 10 * CONTEXT and int(found["training"].max()) < TOKENS
        assert len(found["training"]) > 9 * len(found["test"]) > 0


def test_one_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def run(command: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[2], timeout))
        if command[2].endswith("step"):
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 3 if command[2].endswith("consolidate") else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert [module for module, _ in asked] == [part[2] for part in gpu.PARTS]
    assert sum(part[1] for part in gpu.PARTS) <= gpu.BUDGET + 60 and all(limit <= 120 for _, limit in asked)
    asked.clear()
    assert gpu.main(["--output", str(tmp_path), "--parts", "peers,counting"]) == 0
    assert len(asked) == 2


def test_the_part_of_a_language_model_runs_in_small(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert gpu.main(["--language", "--toy", "--output", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    (row,) = table["rows"]
    assert float(row[table["header"].index("kept drift")]) < 1e-5
