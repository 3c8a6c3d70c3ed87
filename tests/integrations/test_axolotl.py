"""The axolotl plugin: against the interface of the installed axolotl, which skips where it is absent, and a stub of it.

The stub has the names of axolotl 0.19 that the plugin meets: `BasePlugin`, and its hooks in the order of its builders.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from training import relative_drift

from nullspace_optim import NumericalRank
from nullspace_optim.errors import OptionError

pydantic = pytest.importorskip("pydantic")
datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402
from trainers import Sentences, bert, logits, names, trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PLUGIN = "nullspace_optim.integrations.axolotl.NullSpacePlugin"
SETTINGS = """
plugins: [nullspace_optim.integrations.axolotl.NullSpacePlugin]
nullspace:
  pool: pool.jsonl
  policy: NumericalRank()
"""


class Base:
    """What axolotl 0.19 calls of a plugin, with what it calls by default."""

    def get_input_args(self) -> Any:
        return None

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []


@pytest.fixture(params=["installed", "stub"])
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, as axolotl makes it from its name."""
    AcceleratorState._reset_state(True)
    monkeypatch.delitem(sys.modules, PLUGIN.rpartition(".")[0], raising=False)
    if request.param == "installed":
        base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
        made = base.load_plugin(PLUGIN)
        assert isinstance(made, base.BasePlugin)
    else:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = Base  # type: ignore[attr-defined]
        module, _, name = PLUGIN.rpartition(".")
        made = getattr(importlib.import_module(module), name)()
    yield made


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of the docstring, with a pool of tokens."""
    monkeypatch.chdir(tmp_path)
    samples = [Sentences(0)[index] for index in range(4)]
    lines = [json.dumps({key: value.tolist() for key, value in sample.items()}) for sample in samples]
    (tmp_path / "pool.jsonl").write_text("\n".join(lines))
    return {**yaml.safe_load(SETTINGS), "output_dir": str(tmp_path / "out")}


def checked(plugin: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    """What axolotl makes of the settings: a model of pydantic with the fields that the plugin adds."""
    module, _, name = plugin.get_input_args().rpartition(".")
    known = getattr(importlib.import_module(module), name)
    rest = {"plugins": (list[str], []), "output_dir": (str, "")}
    return pydantic.create_model("Config", __base__=known, **rest)(**cfg).model_dump(exclude_none=True)


def test_four_lines_keep_a_pool(plugin: Any, cfg: dict[str, Any], tmp_path: Path) -> None:
    (callback,) = plugin.add_callbacks_pre_trainer(checked(plugin, cfg), bert())
    running = trainer(bert(), 1, tmp_path / "out", callback)
    assert isinstance(callback._options["policy"], NumericalRank)
    with torch.no_grad():
        old = logits(running.model.eval())
    running.train()
    assert relative_drift(logits(running.model.eval()), old) < 1e-5
    assert names(running) == ["pool", "task 2"] and (tmp_path / "out" / "bases.safetensors").is_file()


def test_wrong_settings_are_named(plugin: Any, cfg: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"nothing says what to keep: nullspace: \{pool"):
        plugin.add_callbacks_pre_trainer({**cfg, "nullspace": None}, bert())
    with pytest.raises(pydantic.ValidationError, match="pol"):
        checked(plugin, {**cfg, "nullspace": {"pol": "x"}})
    with pytest.raises(OptionError, match=r"nullspace: pool: none.jsonl: there is no such file"):
        plugin.add_callbacks_pre_trainer({**cfg, "nullspace": {"pool": "none.jsonl"}}, bert())
    with pytest.raises(OptionError, match=r"nullspace: policy: 'Enrgy': expected a call such as Energy"):
        plugin.add_callbacks_pre_trainer({**cfg, "nullspace": {"policy": "Enrgy"}}, bert())


def test_all_settings_reach_the_callback(plugin: Any, cfg: dict[str, Any], tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["some text"]}).save_to_disk(str(tmp_path / "saved"))
    settings = {"pool": "saved", "after": False, "project": "update", "path": "b", "bases": "a", "max_batches": 3}
    (callback,) = plugin.add_callbacks_pre_trainer(checked(plugin, {**cfg, "nullspace": settings}), bert())
    assert callback._before[0] == {"text": "some text"} and callback._after is False and callback._bases == "a"
    assert callback._options == {"project": "update"} and callback._tasks.options.max_batches == 3
    assert callback._tasks.options.path == "b"
    again = {**cfg, "nullspace": {"pool": {"path": "json", "data_files": "pool.jsonl", "split": "train[:2]"}}}
    (callback,) = plugin.add_callbacks_pre_trainer(checked(plugin, again), bert())
    assert len(callback._before) == 2
