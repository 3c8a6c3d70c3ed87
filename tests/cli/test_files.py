"""verify, diff and export: against real runs, exact mathematics and every kind of wrong input."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest
import safetensors.torch
import torch
from stores import full_store
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim import FixedRank, NullSpaceOptimizer
from nullspace_optim.cli import _parser, main
from nullspace_optim.errors import BasisFileError
from nullspace_optim.files.basis_file import load, save
from nullspace_optim.files.compare import compare_stores
from nullspace_optim.files.rename import rename_store
from nullspace_optim.settings import Settings
from nullspace_optim.subspace.linalg import principal_angles


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 4)).eval()


def rows(seed: int) -> Tensor:
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(seed))


def wrapped(model: nn.Module, k: int = 4) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), 1e-2), model, policy=FixedRank(k))


def train(model: nn.Module, opt: NullSpaceOptimizer, steps: int = 3) -> None:
    for step in range(steps):
        opt.zero_grad()
        model(rows(50 + step)).square().mean().backward()
        opt.step()


class Run:
    """Two tasks of one model, with the files a user would have."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = folder / "first.safetensors", folder / "second.safetensors"
        self.weights, self.folder = folder / "model.safetensors", folder
        model = network()
        opt = NullSpaceOptimizer(AdamW(model.parameters(), 1e-2), model, policy=FixedRank(4))
        opt.consolidate([rows(0)], name="one", progress=False)
        opt.save(self.first)
        train(model, opt)
        opt._core.options = Settings(policy=FixedRank(6))
        opt.consolidate([rows(1)], name="two", progress=False)
        opt.save(self.second)
        train(model, opt)
        safetensors.torch.save_file(model.state_dict(), self.weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp("run"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nullspace_optim: ") and captured.err.count("\n") == 1
    return captured.err


def changed(run: Run, name: str, tmp_path: Path, value: float = 0.1) -> Path:
    weights = safetensors.torch.load_file(run.weights)
    weights[name] = weights[name] + value
    safetensors.torch.save_file(weights, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_trained_weights_are_verified(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for bases in (run.first, run.second):
        assert main(["verify", str(bases), str(run.weights)]) == 0
        text = capsys.readouterr().out
        assert "0.weight" in text and "MOVED" not in text and ", 0 moved" in text


def test_a_folder_of_weights_is_verified(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.second), str(run.folder)]) == 0


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "1.running_mean"])
def test_whatever_moved_is_named_and_exit_code_1(
    name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run.second), str(changed(run, name, tmp_path))]) == 1
    moved = [line for line in capsys.readouterr().out.splitlines() if "MOVED" in line]
    assert len(moved) == 1 and name in moved[0]


def test_a_change_in_free_directions_is_no_drift(run: Run, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(run.weights)
    basis = load(run.first)["0.weight"].U
    free = torch.randn(10, 12) @ (torch.eye(12) - basis @ basis.T)
    weights["0.weight"] = weights["0.weight"] + 0.1 * free
    safetensors.torch.save_file(weights, tmp_path / "free.safetensors")
    assert main(["verify", str(run.first), str(tmp_path / "free.safetensors")]) == 0


def test_not_a_number_is_drift(run: Run, tmp_path: Path) -> None:
    assert main(["verify", str(run.second), str(changed(run, "0.weight", tmp_path, math.nan))]) == 1


def test_tolerance_decides(run: Run, tmp_path: Path) -> None:
    slightly = changed(run, "3.bias", tmp_path, 1e-4)
    assert main(["verify", str(run.second), str(slightly)]) == 1
    assert main(["verify", str(run.second), str(slightly), "--tolerance", "0.1"]) == 0


def test_a_tolerance_out_of_range_and_nothing_to_compare_are_no_results(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("-1", "nan"):
        assert "expected a number in [0, inf)" in refused(
            capsys, "verify", run.second, run.weights, "--tolerance", wrong
        )
    assert "nothing to compare" in refused(capsys, "diff", run.first, run.second, "--only", "zzz")


def test_half_precision_weights_are_judged_by_their_rounding(run: Run, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(run.weights)
    halves = {
        name: t.bfloat16() if t.is_floating_point() and "running" not in name else t for name, t in weights.items()
    }
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    assert main(["verify", str(run.second), str(tmp_path / "half.safetensors")]) == 0


def test_names_are_matched_by_rename_and_prefixes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = safetensors.torch.load_file(run.weights)
    safetensors.torch.save_file({f"module.{name}": t for name, t in weights.items()}, tmp_path / "ddp.safetensors")
    assert main(["verify", str(run.second), str(tmp_path / "ddp.safetensors")]) == 0
    safetensors.torch.save_file({f"net.{name}": t for name, t in weights.items()}, tmp_path / "net.safetensors")
    capsys.readouterr()
    error = refused(capsys, "verify", run.second, tmp_path / "net.safetensors")
    assert "lack" in error and "--rename" in error and "net.0" in error
    assert main(["verify", str(run.second), str(tmp_path / "net.safetensors"), "--rename", "^net[.]", ""]) == 0


def test_only_checks_a_part(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = changed(run, "3.weight", tmp_path)
    assert main(["verify", str(run.second), str(broken), "--only", "^0"]) == 0
    assert main(["verify", str(run.second), str(broken), "--only", "^3"]) == 1
    capsys.readouterr()
    assert "--only" in refused(capsys, "verify", run.second, broken, "--only", "nothing")


def test_wrong_weights_are_one_clear_error(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = safetensors.torch.load_file(run.weights)
    safetensors.torch.save_file({**weights, "0.weight": torch.zeros(10, 13)}, tmp_path / "shape.safetensors")
    assert "(10, 13)" in refused(capsys, "verify", run.second, tmp_path / "shape.safetensors")
    assert "No such file" in refused(capsys, "verify", run.second, tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    assert "damaged" in refused(capsys, "verify", run.second, tmp_path / "text.safetensors")
    assert "regular expression" in refused(capsys, "verify", run.second, run.weights, "--rename", "(", "")
    assert "bad replacement" in refused(capsys, "verify", run.second, run.weights, "--rename", "0", r"\9")


def test_pickles_are_never_read(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.save({}, folder / "open_clip_pytorch_model.bin")
    assert "never read" in refused(capsys, "verify", run.second, folder)
    assert "never read" in refused(capsys, "verify", run.second, folder / "open_clip_pytorch_model.bin")


def test_sharded_checkpoints_are_read_and_confined_to_their_folder(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = list(safetensors.torch.load_file(run.weights).items())
    for part in (0, 1):
        safetensors.torch.save_file(dict(weights[part::2]), tmp_path / f"part-{part}.safetensors")
    index = {name: f"part-{number % 2}.safetensors" for number, (name, _) in enumerate(weights)}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(index).replace(chr(39), chr(34))}}}')
    assert main(["verify", str(run.second), str(tmp_path)]) == 0
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    capsys.readouterr()
    assert "outside" in refused(capsys, "verify", run.second, tmp_path)


def test_a_file_agrees_with_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(run.second), str(run.second)]) == 0
    assert "0 differ" in capsys.readouterr().out


def test_growth_is_told_from_change(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(run.first), str(run.second)]) == 1
    text = capsys.readouterr().out
    assert "4 -> 6" in text and "2 more directions in the second file" in text
    assert "task two is only in the second file" in text and "directions differ" not in text


def test_angles_and_anchors_agree_with_dense_mathematics(run: Run) -> None:
    first, second = load(run.first), load(run.second)
    side = next(one for one in compare_stores(first, second) if one.name == "0.weight").sides[0]
    angles = principal_angles(first["0.weight"].U, second["0.weight"].U)
    assert side.ranks == (4, 6) and side.shared == 4
    assert side.angle == pytest.approx(float(angles.max()), abs=1e-12) and side.anchors < 1e-5


def test_a_turned_direction_shows_its_angle() -> None:
    first, second = full_store(), full_store()
    basis = second["visual.fc.weight"].subspaces["right"]
    complement = torch.linalg.qr(torch.cat([basis.basis[0], torch.randn(8, 1)], 1)).Q[:, -1]
    turned = basis.basis.clone()
    turned[0, :, 0] = math.cos(0.1) * turned[0, :, 0] + math.sin(0.1) * complement
    basis.basis = turned
    torch.manual_seed(0)
    for name in first:  # the two stores were drawn one after the other
        if name != "visual.fc.weight":
            second.put(first[name])
    mine = first["visual.fc.weight"].subspaces["right"]
    mine.basis, mine.anchor = basis.basis.clone(), basis.anchor.clone()
    mine.basis[0, :, 0] = (turned[0, :, 0] - math.sin(0.1) * complement) / math.cos(0.1)
    found = next(one for one in compare_stores(first, second) if one.name == "visual.fc.weight")
    assert found.sides[0].angle == pytest.approx(0.1, abs=1e-6) and found.sides[0].shared == 2
    assert found.notes == ("right: 1 of 3 directions differ",)


def test_other_weights_show_in_the_anchors(run: Run) -> None:
    first, second = load(run.second), load(run.second)
    second["0.weight"].subspaces["right"].anchor = second["0.weight"].subspaces["right"].anchor * 1.5
    found = next(one for one in compare_stores(first, second) if one.name == "0.weight")
    assert found.sides[0].anchors == pytest.approx(0.5, rel=1e-5) and "other anchors" in found.notes[0]


def test_renaming_reaches_biases_buffers_and_tasks(tmp_path: Path) -> None:
    save(full_store(), tmp_path / "in")
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "in"), "--rename", "^joint[.]", "other."]) == 0
    store = load(tmp_path / "out")
    assert store["other.weight"].bias == "other.bias" and "joint.weight" not in store
    with pytest.raises(BasisFileError, match="two parameters"):
        rename_store(full_store(), lambda name: "same")


def test_only_cuts_down_and_an_empty_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(full_store(), tmp_path / "in")
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "in"), "--only", "^visual"]) == 0
    assert all(name.startswith("visual") for name in load(tmp_path / "out"))
    capsys.readouterr()
    assert "no parameter matches" in refused(
        capsys, "export", tmp_path / "none", tmp_path / "in", "--only", "^nothing$"
    )


def test_export_does_not_write_over_what_it_reads(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.second.read_bytes()
    assert "another name" in refused(capsys, "export", run.second, run.second)
    assert run.second.read_bytes() == before


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "export", "plan"])
def test_help_has_examples_that_parse_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "exit codes:" in text
    examples = [line.strip() for line in text.splitlines() if line.startswith("  python -m nullspace_optim")]
    assert examples
    for example in examples:
        _parser().parse_args(shlex.split(example.split(" | ")[0])[3:])
