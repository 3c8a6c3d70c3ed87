"""Every optimizer of the installed libraries holds, is refused by name, or does not run on its own: none leaks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from tests.contract.installed_optimizers import LIBRARIES, Candidate, candidates
from tests.contract.optimizers import main, measure

FINE = ("holds", "refused", "does not run", "idle")
DIVERGING = ("DAdaptLion",)  # its estimate of the step grows while a part of its steps is undone
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ALL = list(candidates(["pytorch_optimizer", "schedulefree", "torchao", "timm"]))
EVERY = pytest.mark.parametrize("candidate", ALL, ids=lambda c: f"{c.library}-{c.name}")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Some of these compile their updates: the same numbers, minutes later."""
    torch.compiler.set_stance("force_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.set_stance("default")


@EVERY
def test_holds_or_is_refused_by_name(candidate: Candidate) -> None:
    result = measure(candidate, steps=20)
    assert result.verdict in FINE, result
    if result.verdict == "refused":
        assert candidate.name in result.reason
    if result.verdict == "holds":
        assert result.drift <= 1e-5
        assert result.unprotected > 1e-5 or candidate.name == "TRAC"  # which hardly moves at first


@pytest.mark.nightly
@EVERY
def test_holds_over_a_long_run(candidate: Candidate) -> None:
    verdict = measure(candidate, steps=500).verdict
    assert verdict in FINE or (candidate.name in DIVERGING and verdict == "diverges")


def test_what_the_libraries_offer_is_mostly_held() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert sum(c.library == "pytorch_optimizer" for c in ALL) > 100


class Swapping(AdamW):
    """Evaluates other weights than those that were corrected."""

    def backup_and_load_cache(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.01)

    def clear_and_load_backup(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.div_(1.01)


class Forgetful(AdamW):
    """Cannot load a state dict that its own class accepts alone."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise TypeError("no such state")


class Still(SGD):
    """Moves nothing."""

    def step(self, closure: Any = None) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    ("kind", "verdict", "resume"),
    [(Swapping, "leaks", "fails"), (Forgetful, "holds", "not alone either"), (Still, "idle", "")],
)
def test_a_failure_would_be_seen(kind: Any, verdict: str, resume: str) -> None:
    result = measure(Candidate("torch", kind.__name__, lambda m: kind(m.parameters(), lr=1e-2)), steps=5)
    assert result.verdict == verdict and result.resume.startswith(resume)


def test_the_page_lists_every_optimizer_of_torch(tmp_path: Path) -> None:
    page = tmp_path / "optimizers.md"
    main(["--libraries", "torch,not_installed", "--steps", "2", "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "# Which optimizers hold" in text and "### torch " in text
    assert "| `AdamW` | holds |" in text and "| `LBFGS` | holds |" in text


def test_the_published_page_shows_no_defect() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "lab" / "optimizers.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert all(row.split(" | ")[1] in FINE for row in rows)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_published_page_lists_every_optimizer_of_the_versions_it_names(library: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "lab" / "optimizers.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {library} (\S+):.*?(?=^### |\Z)", text, re.M | re.S)
    assert section is not None, f"the page has no section about {library}"
    pytest.importorskip(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {candidate.name for candidate in candidates([library])}
    if version(library.replace("_", "-")).split("+")[0] != section.group(1):
        pytest.skip(f"another {library} is installed: python -m tests.contract.optimizers makes the page anew")
    assert set(re.findall(r"^\| `(\w+)`", section.group(0), re.M)) == found
