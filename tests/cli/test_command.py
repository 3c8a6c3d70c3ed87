"""The command line: what it prints, its exit codes, one line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stores import full_store

from nullspace_optim.cli import main
from nullspace_optim.files.basis_file import save
from nullspace_optim.subspace.basis import BasisStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bases.safetensors"
    save(full_store(), path)
    return path


def test_inspect_prints_tasks_parameters_and_totals(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert "11 parameters, 2 tasks" in text
    assert "task 2: birds, ok True, rows 320" in text
    assert lines["visual.proj"] == ["visual.proj", "protected", "left", "4/8", "99.9100%", "1,2"]
    assert lines["head.weight"] == ["head.weight", "free", "not", "read"]
    assert "7 protected, 1 full, 2 frozen, 1 free" in text
    assert "37 of 102 used (36.3%)" in text and "3 of 9 frozen" in text
    assert "kept 20 bytes" in text


def test_names_cannot_write_to_the_terminal(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(saved)])
    text = capsys.readouterr().out
    assert "\x1b" not in text and r"scale\n\x1b[31m/../é" in text


def test_an_empty_file_of_bases_can_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BasisStore(), tmp_path / "empty")
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "0 parameters, 0 tasks" in capsys.readouterr().out


def test_plot_writes_an_image(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(saved), "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nullspace_optim: ") and error.count("\n") == 1
    return error


@pytest.mark.fault(117)
def test_a_missing_or_bad_file_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-file" in one_line_error(capsys, "inspect", str(tmp_path / "no-such-file"))
    (tmp_path / "text").write_text("not bases")
    assert "not a nullspace_optim file" in one_line_error(capsys, "inspect", str(tmp_path / "text"))
    assert "regular file" in one_line_error(capsys, "inspect", str(tmp_path))


def test_an_image_that_cannot_be_drawn_is_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert "--plot" in one_line_error(capsys, "inspect", str(saved), "--plot", str(saved.parent / "out.xyz"))
    assert "out.png" in one_line_error(capsys, "inspect", str(saved), "--plot", str(saved.parent / "no" / "out.png"))


@pytest.mark.fault(117)
def test_missing_matplotlib_says_which_extra_to_install(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "nullspace-optim[plots]" in one_line_error(capsys, "inspect", str(saved), "--plot", "out.png")


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["unknown"], ["inspect", "a", "b"], ["inspect", "a", "--plots"]], ids=str
)
@pytest.mark.fault(117)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m nullspace_optim")


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"]], ids=str)
def test_help_shows_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "python -m nullspace_optim inspect bases.safetensors" in capsys.readouterr().out


def run(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nullspace_optim", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}
    )


@pytest.mark.fault(117)
def test_a_closed_pipe_is_quiet(saved: Path) -> None:
    process = run("inspect", str(saved))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=300) == 0
    process.stderr.close()


def test_a_terminal_without_unicode_shows_escapes(saved: Path) -> None:
    output, error = run("inspect", str(saved), PYTHONIOENCODING="ascii").communicate(timeout=300)
    assert error == b"" and rb"/../\xe9" in output
