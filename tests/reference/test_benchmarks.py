"""Smoke tests of the benchmarks: every table is made, at tiny sizes; nothing here looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nullspace_optim import NullSpaceOptimizer
from reference.benchmarks import consolidate, counting, drift, policies, step, workload
from reference.benchmarks.outcome import Outcome, Table
from reference.benchmarks.workload import in_turn, ratio

CPU = torch.device("cpu")
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small open_clip model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    save_file(open_clip.CLIP(**MODEL).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two classes, six images a class: coloured noise."""
    root = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for task in ("old", "new"):
        for part in ("train", "test"):
            for number, name in enumerate(("first", "second")):
                folder = root / task / part / name
                folder.mkdir(parents=True)
                for index in range(6):
                    noise = torch.randint(0, 128, (32, 32, 3), generator=draw) + 100 * number
                    Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


def column(table: Table, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


def test_step_makes_every_table(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--batch", "4", "--repeats", "1", "--shares", "1/4,3/4", "--output", str(tmp_path)]
    (steps,) = step.main(arguments).tables
    assert column(steps, "k/d") == ["1/4", "1/4", "3/4", "3/4"]
    assert all(float(drift) <= 1e-5 for drift in column(steps, "drift"))
    assert all(float(predicted) > 1 for predicted in column(steps, "predicted"))
    assert json.loads((tmp_path / "step.json").read_text())["command"].startswith("python -m reference.benchmarks.step")


def test_filled_bases_are_orthonormal_and_the_step_protects_them() -> None:
    model = workload.build("tiny", None, CPU)
    optimizer = workload.protected_at_random(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    for share in (0.75, 0.25):
        workload.fill(optimizer, share)
        for basis in optimizer.bases.values():
            for side, subspace in basis.subspaces.items():
                if side != "rows":
                    assert subspace.basis.shape == (1, subspace.size, round(share * subspace.size))
                    gram = subspace.basis[0].T @ subspace.basis[0]
                    assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5)
        step.Trainer(model, optimizer, workload.random_batch(model, 4, CPU), torch.float32).timed_step()
        assert optimizer.verify().worst <= 1e-5
    names = set(workload.matrices(model))
    assert names == {name for name, basis in optimizer.bases.items() if set(basis.subspaces) & {"right", "left"}}


def test_operations_of_a_protected_step() -> None:
    model = torch.nn.Linear(16, 8, bias=False)
    optimizer = NullSpaceOptimizer(workload.Still(model.parameters()), model, policy=workload.Share(0.25))
    optimizer.consolidate([torch.randn(2, 16)], progress=False)
    assert counting.protection_operations(optimizer.bases, "exact") == 4 * 8 * 16 * 4
    assert counting.protection_operations(optimizer.bases, "fast") == 4 * 8 * 16 * 4 * (1 + 1 / 16)


def test_consolidate_tells_the_parts() -> None:
    outcome = consolidate.main(["--model", "tiny", "--images", "8"])
    (passes,) = outcome.tables
    assert column(passes, "rows") == ["relevant", "all"]
    case = consolidate.prepare("tiny", None, 64, CPU)
    spent = consolidate.measure(case, "relevant", 1, CPU)
    assert [part for part, seconds in spent.parts.items() if seconds <= 0] == []
    assert sum(spent.parts.values()) <= spent.whole[0]
    assert consolidate.measure(case, "all", 1, CPU).parts["relevance"] == 0


def test_consolidate_reads_a_folder(clip_folder: Path) -> None:
    outcome = consolidate.main(["--model", str(clip_folder), "--images", "8", "--rows", "all"])
    assert len(outcome.tables) == 1


def test_drift_makes_both_tables(clip_folder: Path, images_folder: Path, tmp_path: Path) -> None:
    arguments = ["--data-root", str(images_folder), "--model", str(clip_folder), "--old", "old", "--new", "new"]
    sizes = ["--optimizer-steps", "10", "--steps", "10", "--batch", "4", "--rate", "1e-2", "--output", str(tmp_path)]
    optimizers, thresholds = drift.main([*arguments, *sizes]).tables
    plain, gradient, anchor = (
        [float(cell) for cell in column(optimizers, name)]
        for name in ("no protection", "gradient projected before the step", "anchor correction")
    )
    assert max(anchor) <= 1e-5
    assert min(plain) > 1e-3
    adamw, momentum = gradient[0], gradient[2]
    assert adamw > 1e-3, "the projected gradient leaks under AdamW"
    assert momentum <= 1e-5, "and is exact under plain momentum"
    policies = column(thresholds, "policy")
    assert policies[0] == "unprotected" and policies[-1] == "NumericalRank()"
    drifts = [float(cell.split()[0]) for cell in column(thresholds, "drift of image features")]
    assert drifts[0] > max(drifts[1:])


def test_policies_are_compared_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("unprotected", "Energy, 0.999", "OWM", "CGP")
    monkeypatch.setattr(policies, "POLICIES", {name: policies.POLICIES[name] for name in chosen})
    monkeypatch.setattr(policies, "TIMED", 1)
    monkeypatch.setattr(policies, "WARM_UP", 60)
    (table,) = drift.main(["--tables", "policies", "--steps", "40", "--output", str(tmp_path)]).tables
    drifts = [float(cell.split()[0]) for cell in column(table, "drift of consolidated outputs")]
    assert drifts[0] > 2 * max(drifts[1:])
    assert all(float(cell) <= 1e-5 for cell in column(table, "allowed moves only")[1:])
    assert (tmp_path / "policies.png").stat().st_size > 5_000
    for wrong in (["--tables", "thresholds"], ["--tables", "policy"]):
        with pytest.raises(SystemExit):
            drift.parse(wrong)


def test_runs_take_turns() -> None:
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 9.0, 6.0], [1.0, 3.0, 3.0]) == 2.0


def test_markdown_of_an_outcome() -> None:
    table = Table("Title", ("a", "b"), (("1", "2"),), "How to read it.")
    outcome = Outcome("step", "python -m x", "a machine", "2026-01-01", 1.0, (table,))
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nHow to read it." in outcome.markdown()
