"""Figures of stored bases: how fast second moments decay and how much of each layer is used.

Matplotlib is imported only when a figure is made. The functions return `Figure` objects that belong to no window and
touch no global state: `figure.savefig("capacity.png")` works everywhere, and a notebook shows the returned figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import OptionError
from .subspace.basis import Basis, BasisStore, Subspace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Layer = tuple[Basis, Subspace]

COLUMNS = 4  # panels side by side
PANELS = 24  # spectra that are drawn unless names are given
GROUPS = 16  # groups of one weight that are drawn
FLOOR = 1e-10  # eigenvalues are drawn down to this share of the largest
GREY, INK, BLUE = "#e9e9ec", "#3c3c43", "#2a5f8f"


def spectra(bases: Mapping[str, Basis], names: Sequence[str] | None = None) -> Figure:
    """Return one panel a layer: eigenvalues of the last task's second moment, and a mark at the protected rank.

    A grey block on the left stands for directions that earlier tasks had already taken; the curve then shows what was
    left. Without `names` at most 24 layers are drawn, evenly spaced. Raises `OptionError` for names without a spectrum.
    """
    layers = _chosen(bases, names)
    figure = _figure(12.0, _spectra_height(layers))
    _draw_spectra(figure, layers, len(_with_spectrum(bases)))
    return figure


def capacity(bases: Mapping[str, Basis]) -> Figure:
    """Return one bar a layer: the share of its directions that each task took (stacked), and what is free."""
    figure = _figure(10.0, _capacity_height(bases))
    _draw_capacity(figure, bases)
    return figure


def overview(bases: Mapping[str, Basis]) -> Figure:
    """Return `capacity` and `spectra` side by side."""
    layers = _chosen(bases, None)
    figure = _figure(21.0, max(_capacity_height(bases), _spectra_height(layers)))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[9, 12])[0]
    _draw_capacity(left, bases)
    _draw_spectra(right, layers, len(_with_spectrum(bases)))
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("figures need matplotlib: pip install 'nullspace-optim[plots]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _with_spectrum(bases: Mapping[str, Basis]) -> dict[str, Layer]:
    """Return the layers that have a spectrum (a row index has none), each with its most used side."""
    found = {}
    for name, basis in bases.items():
        sides = [subspace for subspace in basis.subspaces.values() if subspace.spectrum.numel()]
        if sides:
            found[name] = (basis, max(sides, key=lambda side: side.rank / max(1, side.dimension)))
    return found


def _chosen(bases: Mapping[str, Basis], names: Sequence[str] | None) -> list[Layer]:
    known = _with_spectrum(bases)
    if names is None:
        every, count = list(known.values()), min(PANELS, len(known))
        return [every[round(place * (len(every) - 1) / max(1, count - 1))] for place in range(count)]
    unknown = [ascii(name) for name in names if name not in known]
    if unknown:
        raise OptionError(f"names: no spectrum is stored for {', '.join(unknown)}; protected weights have one")
    return [known[name] for name in names]


def _spectra_height(layers: Sequence[Layer]) -> float:
    return 1.2 + 1.7 * max(1, -(-len(layers) // COLUMNS))


def _capacity_height(bases: Mapping[str, Basis]) -> float:
    return 1.4 + 0.22 * max(3, sum(basis.main is not None for basis in bases.values()))


def _short(name: str, length: int) -> str:
    """Return `name` printable and at most `length` characters long, its end kept."""
    text = ascii(name)[1:-1]
    return text if len(text) <= length else "..." + text[3 - length :]


def _draw_spectra(figure: Figure | SubFigure, layers: Sequence[Layer], total: int) -> None:
    count = f" ({len(layers)} of {total} layers)" if len(layers) < total else ""
    key = "grey: taken by earlier tasks, blue: by the last one, dashed: protected rank"
    figure.suptitle(f"Eigenvalues of the last task's inputs{count}; {key}", fontsize=10, x=0.01, ha="left")
    columns = min(COLUMNS, max(1, len(layers)))
    panels = figure.subplots(-(-max(1, len(layers)) // columns), columns, squeeze=False, sharey=True)
    for panel, layer in zip(panels.flat, layers):
        _draw_spectrum(panel, *layer)
    for panel in panels.flat[len(layers) :]:
        panel.set_axis_off()
    figure.supxlabel("direction", fontsize=9)
    figure.supylabel("eigenvalue / largest", fontsize=9)


def _draw_spectrum(axes: Axes, basis: Basis, subspace: Subspace) -> None:
    """Draw the decay of `spectrum` `[g, s]`; ranks are means over groups."""
    groups = len(subspace.ranks)
    rank, taken = subspace.rank / groups, _taken_before(basis, subspace) / groups
    axes.axvspan(0, taken, color=GREY, lw=0)
    axes.axvspan(taken, rank, color=BLUE, alpha=0.12, lw=0)
    axes.axvline(rank, color=BLUE, lw=1.2, ls=(0, (4, 2)))
    for values in subspace.spectrum[:GROUPS]:
        heights = _relative(values[: subspace.size - round(taken)])
        places = [taken + place + 0.5 for place in range(len(heights))]
        axes.plot(places, heights, color=INK, lw=1.3, alpha=1.0 if groups == 1 else 0.4)
    axes.set(yscale="log", ylim=(FLOOR / 2, 3.0), xlim=(0, subspace.size))
    axes.set_yticks([1.0, 1e-3, 1e-6, 1e-9])
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.set_title(_short(basis.name, 29), fontsize=8, loc="left", parse_math=False)
    label = f"{rank:.4g} of {subspace.size}" + (f" x {groups}" if groups > 1 else "")
    axes.set_title(label, fontsize=8, loc="right", color=BLUE)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _relative(values: Tensor) -> list[float]:
    """Return eigenvalues `[n]` as shares of the largest, cut off below what is drawn."""
    largest = max([float(value) for value in values] or [0.0]) or 1.0
    return [max(float(value) / largest, FLOOR) for value in values]


def _taken_before(basis: Basis, subspace: Subspace) -> int:
    """Return how many directions earlier tasks had taken before the spectrum was measured (appending policies)."""
    grown = subspace.covariance is None and subspace is basis.main and len(basis.history) > 1
    return min(basis.history[-2], subspace.rank) if grown else 0


def _draw_capacity(figure: Figure | SubFigure, bases: Mapping[str, Basis]) -> None:
    layers = [basis for basis in bases.values() if basis.subspaces]
    shares = [_shares(basis) for basis in layers]
    colors = _colors(bases, shares)
    axes = figure.subplots()
    axes.barh(range(len(layers)), 1.0, color=GREY, height=0.72)
    for row, (parts, basis) in enumerate(zip(shares, layers)):
        left = 0.0
        for task, share in parts:
            axes.barh(row, share, left=left, color=colors[task], height=0.72)
            left += share
        axes.text(1.01, row, f"{basis.rank}/{basis.dimension}", va="center", fontsize=7, color=INK)
    axes.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6))
    names = [_short(basis.name, 52) for basis in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=7, parse_math=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    others = len(bases) - len(layers)
    note = f" ({others} parameters without a basis not shown)" if others else ""
    axes.set_title(f"Directions used by each task{note}", fontsize=10, loc="left")
    _legend(figure, {**colors, "free": GREY})


def _shares(basis: Basis) -> list[tuple[str, float]]:
    """Return, per task, the share of directions it added and that are still protected."""
    if not basis.tasks or len(basis.tasks) != len(basis.history):
        return [("all tasks", basis.rank / max(1, basis.dimension))]
    still = list(accumulate(reversed([*basis.history[:-1], basis.rank]), min))[::-1]
    return [
        (task, (now - before) / max(1, basis.dimension)) for task, before, now in zip(basis.tasks, [0, *still], still)
    ]


def _colors(bases: Mapping[str, Basis], shares: Sequence[Sequence[tuple[str, float]]]) -> dict[str, Any]:
    """Return a colour a task, dark to light in the order of the tasks."""
    import matplotlib

    known = [str(task.get("name", "")) for task in bases.tasks] if isinstance(bases, BasisStore) else []
    used = {task for parts in shares for task, _ in parts}
    tasks = [*(task for task in dict.fromkeys(known) if task in used), *sorted(used - set(known))]
    palette = matplotlib.colormaps["viridis"]
    return {task: palette(0.08 + 0.84 * place / max(1, len(tasks) - 1)) for place, task in enumerate(tasks)}


def _legend(figure: Figure | SubFigure, colors: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=_short(name, 24)) for name, color in colors.items()]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
