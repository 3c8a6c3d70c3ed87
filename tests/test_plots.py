"""Figures: right panels and bars, no global state, a clear word when matplotlib is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stores import full_store, protected

from nullspace_optim.errors import OptionError
from nullspace_optim.plots import capacity, overview, spectra
from nullspace_optim.subspace.basis import BasisStore

pytest.importorskip("matplotlib")


def test_spectra_draws_one_panel_a_layer_and_marks_the_rank() -> None:
    figure = spectra(full_store())
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 8
    mark, curve = panels[0].lines[0], panels[0].lines[-1]
    assert mark.get_xdata()[0] == 3
    assert len(curve.get_ydata()) == 8 - 1, "one direction was taken by the first task"
    assert max(curve.get_ydata()) == 1.0


def test_spectra_of_chosen_layers() -> None:
    titles = [axes.get_title(loc="left") for axes in spectra(full_store(), ["visual.proj", "conv.weight"]).axes]
    assert titles == ["visual.proj", "conv.weight"]


def test_spectra_names_what_has_no_spectrum() -> None:
    with pytest.raises(OptionError, match=r"'head\.weight'"):
        spectra(full_store(), ["visual.proj", "head.weight"])


def test_spectra_of_many_layers_draws_an_even_selection() -> None:
    store = BasisStore()
    for place in range(60):
        store.put(protected(f"blocks.{place}.weight", (4, 6), "right", 2))
    titles = [axes.get_title(loc="left") for axes in spectra(store).axes]
    assert len(titles) == 24 and titles[0] == "blocks.0.weight" and titles[-1] == "blocks.59.weight"


def test_spectra_survive_zeros_and_a_full_basis() -> None:
    store = BasisStore()
    store.put(protected("dead", (3, 4), "right", 0))
    store.put(protected("full", (3, 4), "right", 4))
    store["dead"].subspaces["right"].spectrum.zero_()
    store["full"].history = (4, 4)
    assert len(spectra(store).axes) == 2


def test_capacity_stacks_what_each_task_added() -> None:
    store = BasisStore()
    basis = protected("w", (4, 10), "right", 6)
    basis.tasks, basis.history = ("a", "b", "c"), (5, 3, 6)
    store.put(basis)
    (axes,) = capacity(store).axes
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == pytest.approx([1.0, 0.3, 0.0, 0.3]), "a merge dropped two directions of the first task"
    assert [text.get_text() for text in axes.texts] == ["6/10"]


def test_capacity_says_what_it_leaves_out() -> None:
    (axes,) = capacity(full_store()).axes
    assert "3 parameters without a basis" in axes.get_title(loc="left")
    assert len(axes.get_yticklabels()) == 8


@pytest.mark.parametrize("draw", [spectra, capacity, overview])
def test_figures_of_an_empty_store_and_of_odd_names_can_be_written(draw: object, tmp_path: Path) -> None:
    store = BasisStore()
    draw(store).savefig(tmp_path / "empty.png")  # type: ignore[operator]
    store.put(protected("$\\frac{\n_^x" * 20, (2, 3), "right", 1))
    store["$\\frac{\n_^x" * 20].tasks = ("$a", "b$_")
    draw(store).savefig(tmp_path / "odd.png")  # type: ignore[operator]
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


def test_figures_leave_no_global_state() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import nullspace_optim.plots; assert 'matplotlib' not in sys.modules\n"
        "from stores import full_store; nullspace_optim.plots.overview(full_store())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    paths = [str(Path(__file__).parent / "support"), str(Path(__file__).parents[1])]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=300)


def test_missing_matplotlib_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'nullspace-optim\[plots\]'"):
        capacity(full_store())


def test_half_precision_and_many_groups() -> None:
    store = BasisStore()
    from nullspace_optim.subspace.layout import Layout

    store.put(protected("depthwise", (40, 1, 3, 3), "right", *[1] * 40, layout=Layout("grouped", 40)))
    store["depthwise"].subspaces["right"].spectrum = torch.rand(40, 9).bfloat16()
    (panel,) = spectra(store).axes
    assert len(panel.lines) == 1 + 16
