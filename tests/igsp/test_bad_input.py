"""Bad input: one clear sentence each, and nothing is changed."""

from __future__ import annotations

import pytest
from synthetic import QUICK, Layer, make
from torch import nn
from torch.optim import AdamW

from nullspace_optim import IGSP, NullSpaceOptimizer
from nullspace_optim.errors import OptionError


def wrap(model: nn.Module, mode: object = None) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode or IGSP(**QUICK))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ()}, r"target_modules=\(\)"),
        (
            {"target_modules": r".*\.attention"},
            r"'\.\*\\\.attention' matches no layer of Layer; its linear layers begin with: 'fc'",
        ),
        ({"target_modules": None}, r"target_modules=None\): expected a list of module names"),
        ({"target_modules": ["fc", 3]}, r"target_modules=\['fc', 3\]\): expected a list of module names"),
        ({"rank": 17}, r"rank=17\): larger than the layer 'fc' \(32 inputs, 16 outputs\)"),
        ({"rank": 0}, r"rank=0\): expected a whole number of at least 1"),
        ({"kind": "adapter"}, r"kind='adapter'\): expected one of 'lora', 'bottleneck'"),
        ({"threshold": 1.5}, r"threshold=1\.5"),
        ({"strength": -1.0}, r"strength=-1\.0"),
        ({"candidates": 2.0}, r"candidates=2\.0\): expected a whole number"),
    ],
)
@pytest.mark.fault(113)
def test_an_option_outside_its_range_is_refused(options: dict[str, object], message: str) -> None:
    model = Layer()
    with pytest.raises(OptionError, match=message):
        wrap(model, IGSP(**{**QUICK, **options}))  # type: ignore[arg-type]
    assert not hasattr(model, "igsp") and not model.fc._forward_hooks


@pytest.mark.fault(113)
def test_a_layer_without_linear_maps_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(OptionError, match=r"'1' \(ReLU\) holds no torch.nn.Linear"):
        wrap(model, IGSP(target_modules="1", rank=2))


def test_the_mode_needs_the_model_and_a_known_name() -> None:
    model = Layer()
    with pytest.raises(OptionError, match="model="):
        NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), mode="igsp")
    with pytest.raises(OptionError, match=r"mode='isgp': expected one of 'null-space', 'igsp'"):
        wrap(model, "isgp")
    with pytest.raises(OptionError, match="mode="):
        wrap(model, IGSP)


def test_a_model_cannot_carry_the_experts_of_two_optimizers() -> None:
    model, _ = make()
    with pytest.raises(OptionError, match=r"already carries experts.*detach\(\)"):
        wrap(model)


def test_the_default_pattern_names_what_there_is_where_nothing_matches() -> None:
    with pytest.raises(OptionError, match=r"\('mlp',\)\): 'mlp' matches no layer"):
        wrap(Layer(), "igsp")
