from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from reference.errors import ExperimentError
from reference.evaluation import metrics
from reference.evaluation.bootstrap import FIGURES, compare, resampled
from reference.evaluation.comparison import by_method
from reference.evaluation.report import main, refuse_mixed, tables
from reference.evaluation.scoring import packed, unpacked
from reference.evaluation.tables import whole

COUNTS = (40, 30, 50)


def run(method: str, seed: int, share: float, random: torch.Generator) -> dict[str, Any]:
    """A run of three tasks whose images are right with chance `share`."""
    right = [[packed(torch.rand(n, generator=random) < share) for n in COUNTS] for _ in range(4)]
    rows = [[100 * float(unpacked(cell).float().mean()) for cell in row] for row in right]
    figures = {n: m.value for n, m in metrics.summary(np.array(rows[1:]), rows[0]).items()}
    return {
        "method": method, "seed": seed, "tasks": ["a", "b", "c"], "right": right, "pretrained": rows[0],
        "accuracy": rows[1:], **figures, "transfer_known": 1.0, "unknown_tasks": ["b"], "seconds": 3.0,
        "peak_memory": {"gpu_mib": None, "process_mib": 10.0}, "trained_parameters": [5_000_000],
        "config": {"note": "mind"}, "machine": {}, "torch": "2",
    }  # fmt: skip


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    return [run(m, s, p, random) for m, p in (("finetune", 0.5), ("ours", 0.8), ("same", 0.5)) for s in (0, 1, 2)]


@pytest.mark.parametrize("figure", FIGURES)
def test_resampled_figures_agree_with_the_metrics_of_each_replicate(figure: str, runs: list[dict[str, Any]]) -> None:
    cells = resampled(runs[0], replicates=5)
    for b in range(5):
        slow = metrics.summary(cells[:, :, b], runs[0]["pretrained"])[figure].value
        assert FIGURES[figure](cells)[b] == pytest.approx(slow)


def test_draws_are_shared_by_methods_and_centred_on_what_was_measured(runs: list[dict[str, Any]]) -> None:
    assert np.array_equal(resampled(runs[0], 50), resampled(json.loads(json.dumps(runs[0])), 50))
    cells = resampled(runs[0], 4000)
    np.testing.assert_allclose(cells.mean(axis=2), np.array(runs[0]["accuracy"]), atol=0.6)
    i = 1
    p = runs[0]["accuracy"][0][i] / 100
    assert cells[0, i].std() == pytest.approx(100 * (p * (1 - p) / COUNTS[i]) ** 0.5, rel=0.1)


def test_a_difference_has_an_interval_that_knows_chance_from_effect(runs: list[dict[str, Any]]) -> None:
    base, ours, same = runs[:3], runs[3:6], runs[6:]
    for figure in FIGURES:
        found = compare(ours, base, figure)
        assert found is not None and found.low > 0 and found.low < found.difference < found.high and found.seeds == 3
        found = compare(base, json.loads(json.dumps(base)), figure)
        assert found == (0.0, 0.0, 0.0, 3)
    average = compare(same, base, "average")
    assert average is not None and average.low < 0 < average.high
    assert compare(ours, [{**r, "seed": r["seed"] + 10} for r in base], "last") is None
    assert compare(ours, [{k: v for k, v in r.items() if k != "right"} for r in base], "last") is None


def test_the_report_is_two_tables_and_a_figure(
    runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for r in runs:
        r["pool"] = {
            "before": {"image_to_text_at_1": 33.0, "text_to_image_at_1": 31.0, "modality_gap": 0.5},
            "after": {"image_to_text_at_1": 21.0, "text_to_image_at_1": 22.0, "modality_gap": 0.625},
        }  # fmt: skip
        folder = tmp_path / "runs" / f"{r['method']}-seed{r['seed']}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(r))
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert matplotlib.image.imread(tmp_path / "out" / "report.png").std() > 0.05
    text, _, shown = (tmp_path / "out" / "report.md").read_text().rpartition("\n![")
    assert shown.endswith("(report.png)\n") and "\nmind\n" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(lines) for lines in tables] == [5, 5]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert "Δ Last to finetune" in tables[0][0] and "0.625 ± 0.000" in tables[1][2]
    assert "below three times chance): b." in text
    assert text in capsys.readouterr().out


def test_methods_stand_in_the_order_of_the_harness_and_others_after_them(runs: list[dict[str, Any]]) -> None:
    named = [{**run, "method": name} for run, name in zip(runs, ("own", "gnsp", "zero-shot", "another"))]
    assert list(by_method(named)) == ["zero-shot", "gnsp", "own", "another"]


def test_a_figure_with_missing_cells_is_a_dash(runs: list[dict[str, Any]]) -> None:
    end = {**runs[0], "accuracy": [[None] * 3, [None] * 3, [50.0, 60.0, 70.0]]}
    assert whole(end, "average") is None and whole(end, "diagonal_gain") is None and whole(end, "preserve") is None
    assert whole(end, "last") == pytest.approx(60.0)
    assert whole(runs[0], "average") == pytest.approx(runs[0]["average"])


def test_runs_of_other_settings_are_no_further_seeds(
    runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_mixed(runs)
    with pytest.raises(ExperimentError, match=r"two runs of ours with seed 1"):
        refuse_mixed([*runs, runs[4]])
    runs[0]["config"] = {"iterations": 60, "split": "test", "seeds": [0]}
    runs[1]["config"] = {"iterations": 100, "split": "test", "seeds": [1], "newer": 1}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for folder, r in zip(("a", "b"), runs):
        (tmp_path / folder / "results.json").write_text(json.dumps(r))
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "finetune has iterations=60 with seed 0 and 100 with seed 1" in capsys.readouterr().err
    runs[0]["config"], runs[1]["config"] = {"reference_root": ""}, {"reference_root": "pool"}
    refuse_mixed(runs[:2])  # plain fine-tuning never looks at a pool
    runs[0]["config"], runs[1]["config"] = {"robust_images": None}, {"robust_images": 60}
    refuse_mixed(runs[:2])  # one seed was attacked, all were trained alike
    runs[0]["config"]["robust_images"] = 20
    with pytest.raises(ExperimentError, match="finetune has robust_images=20 with seed 0 and 60 with seed 1"):
        refuse_mixed(runs[:2])
    three = [{**runs[0], "seed": n, "config": {"robust_images": images}} for n, images in enumerate((None, 20, 60))]
    with pytest.raises(ExperimentError, match="finetune has robust_images=20 with seed 1 and 60 with seed 2"):
        refuse_mixed(three)
    runs[0]["config"], runs[1]["config"] = {"reference_root": ""}, {"reference_root": "pool"}
    for r in runs[:2]:
        r["method"] = "gnsp"
    with pytest.raises(ExperimentError, match="gnsp has reference_root=''"):
        refuse_mixed(runs[:2])
    runs[0]["config"] = {"iterations": 60, "split": "test"}
    runs[1]["config"] = {"iterations": 60, "split": "validation"}
    with pytest.raises(ExperimentError, match="validation and some on test"):
        refuse_mixed(runs[:2])


def test_results_from_before_are_reported_as_far_as_they_go(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    old = {
        k: v
        for k, v in runs[0].items()
        if k not in ("right", "pool", "trained_parameters", "transfer_known", "preserve")
    }
    (tmp_path / "results.json").write_text(json.dumps(old))
    end = {**runs[3], "accuracy": [[None] * 3, [None] * 3, [50.0] * 3], "transfer": None}
    end["right"] = [*end["right"][:1], [""] * 3, [""] * 3, end["right"][3]]
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "results.json").write_text(json.dumps(end))
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 0
    head, *_, ours = tables([old, end], "")[0]
    row = dict(zip(head, ours))
    assert [row[name] for name in ("method", "Transfer", "Transfer, known tasks", "Average")] == [
        "ours",
        "-",
        "1.0",
        "-",
    ]


def test_what_is_no_run_is_named(
    tmp_path: Path, runs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2 and "no results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == 2 and "not a results file" in capsys.readouterr().err
    for name, content in (("one", runs[0]), ("two", {**runs[1], "tasks": ["c", "b", "a"]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "one.json"), str(tmp_path / "two.json")]) == 2
    assert "report each order by itself" in capsys.readouterr().err
