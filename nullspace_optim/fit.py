"""Whether stored bases belong to the parameters at hand: names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .basis import Basis, BasisStore
from .errors import BasisFileError, ShapeError


def check_fit(store: BasisStore, parameters: Mapping[str, Tensor]) -> None:
    """Refuse bases that do not belong to `parameters`.

    Raises:
        BasisFileError: the store names parameters that are not there.
        ShapeError: a parameter has another shape than its basis.
    """
    missing = sorted(set(store) - set(parameters))
    if missing:
        unexpected = sorted(set(parameters) - set(store))
        raise BasisFileError(
            f"the bases name parameters that the model (or the optimizer) lacks: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; without a basis here: {', '.join(unexpected[:5]) or 'none'}"
        )
    check_shapes(store, parameters)


def check_shapes(store: Mapping[str, Basis], parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters of another shape than their basis, naming both.

    Raises:
        ShapeError: a parameter has another shape than its basis.
    """
    wrong = [
        f"'{name}' is {tuple(parameters[name].shape)}, its basis was made for {basis.shape}"
        for name, basis in store.items()
        if tuple(parameters[name].shape) != tuple(basis.shape)
    ]
    if wrong:
        raise ShapeError(
            f"shapes changed: {'; '.join(wrong[:5])}; use the model the bases were made with, or release() the name"
        )
