"""Small parts that several rooms share: option checks, tensor trees, random signs, sizes, exact products."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nullspace_optim.errors import OptionError
from nullspace_optim.formatting import size
from nullspace_optim.model.batches import tensors_in
from nullspace_optim.options import check_choice
from nullspace_optim.settings import CHOICES, Settings
from nullspace_optim.subspace.linalg import random_signs
from nullspace_optim.subspace.projection import exact_products


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_value_of_an_option_is_refused_with_all_known_ones(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        Settings(**{name: "some"})
    assert str(caught.value) == f"{name}='some': expected one of {', '.join(map(repr, CHOICES[name]))}"
    for value in CHOICES[name]:
        assert getattr(Settings(**{name: value}), name) == value


def test_a_choice_of_a_class_is_named_with_it() -> None:
    check_choice("kind", "lora", ("lora", "bottleneck"), owner="IGSP")
    with pytest.raises(OptionError, match=r"IGSP\(kind='x'\): expected one of 'lora', 'bottleneck'"):
        check_choice("kind", "x", ("lora", "bottleneck"), owner="IGSP")


@dataclass
class Pair:
    second: Tensor
    first: Tensor


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_tensors_of_a_tree_come_in_order_whatever_holds_them() -> None:
    a, b, c, d, e, f = (torch.full((1,), float(i)) for i in range(6))
    loop: list[Any] = [e]
    loop.append(loop)
    tree = [a, {"x": b, "name": "text", "module": nn.Linear(1, 1)}, Pair(c, d), (loop, loop), UserDict(k=f), Plain(a)]
    assert [float(t) for t in tensors_in(tree)] == [0, 1, 2, 3, 4, 5, 0]
    assert [float(t) for t in tensors_in((a, a))] == [0, 0], "a tensor that occurs twice comes twice"
    assert not list(tensors_in([None, 3, "text", len, object(), nn.Linear(1, 1)]))


@pytest.mark.parametrize("shape", [(5,), (7, 8)])
def test_random_signs_are_the_same_for_the_same_first_dimension(shape: tuple[int, ...]) -> None:
    expected = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(shape[0])) * 2 - 1
    state = torch.get_rng_state()
    assert torch.equal(random_signs(*shape), expected) and set(expected.unique().tolist()) <= {-1, 1}
    assert torch.equal(torch.get_rng_state(), state), "no generator of the user is touched"


@pytest.mark.parametrize(
    ("count", "long", "short"),
    [(0, "0 bytes", "0 B"), (999, "999 bytes", "999 B"), (8112, "8.112 kB", "8.11 kB"), (2.5e12, "2.5 TB", "2.5 TB")],
)
def test_sizes_have_four_digits_in_tables_and_three_in_reports(count: float, long: str, short: str) -> None:
    assert (size(count), size(count, 3, "B")) == (long, short)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_are_exact_on_every_device_and_settings_come_back(device: str) -> None:
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_products(torch.device(device)):
            rows = torch.randn(4, 3, device=device)
            assert (rows @ rows.T).dtype == torch.float32 or device == "meta"
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == before
