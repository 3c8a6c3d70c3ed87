"""What an installation gets: the five packages of the card and tqdm, one import package, nothing of the tests."""

from __future__ import annotations

import ast
import re
import runpy
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECLARED = {"torch", "open-clip-torch", "scipy", "numpy", "safetensors", "tqdm"}


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_the_project_declares_five_packages_and_tqdm() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert {_name(item) for item in re.findall(r'"([^"]+)"', listed.group(1))} == DECLARED


def test_the_oldest_end_of_the_nightly_tests_pins_every_lower_bound() -> None:
    nightly: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "nightly.py"))
    pinned = [item for item in nightly["requirements"]("oldest") if item not in nightly["OLDEST_COMPANIONS"]]
    assert {_name(item) for item in pinned} == DECLARED and all("==" in item for item in pinned)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as the build back end makes it."""
    builder = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (made,) = builder.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(made)


def test_the_wheel_declares_them_and_no_more_without_an_extra(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(wheel.read(name).decode())
    plain = [item for item in metadata.get_all("Requires-Dist", []) if "extra ==" not in item]
    assert {_name(item) for item in plain} == DECLARED
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_wheel_holds_the_package_and_its_type_marker_only(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"nullspace_optim"}
    assert "nullspace_optim/py.typed" in names and "nullspace_optim/integrations/lightning.py" in names


OPTIONAL = ("lightning", "pytorch_lightning", "transformers", "accelerate", "peft", "schedulefree", "torchao", "timm")


def test_nothing_of_the_package_imports_an_optional_one() -> None:
    allowed = {"integrations/lightning.py", "integrations/transformers.py"}
    hits = []
    for path in sorted((ROOT / "nullspace_optim").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top of a file: paid by every import
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
                first = {alias.name.split(".")[0] for alias in node.names} if module is None else {module.split(".")[0]}
                if getattr(node, "level", 0) == 0 and first & {*OPTIONAL, "matplotlib", "sklearn", "torchvision"}:
                    hits.append(path.relative_to(ROOT / "nullspace_optim").as_posix())
    assert set(hits) <= allowed
