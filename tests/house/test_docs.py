"""The pages: their code runs, commands parse, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nullspace_optim
from nullspace_optim import Fate
from nullspace_optim.cli import _parser
from nullspace_optim.errors import NullSpaceWarning

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
# pages of one program each; others have tests of their own
EXECUTED = ["exactness", "files", "migration", "policies"]


def blocks(page: Path, language: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        yield found.group(1)


@pytest.mark.parametrize("name", EXECUTED)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": name}
    found = list(blocks(DOCS / f"{name}.md", "python"))
    assert found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullSpaceWarning)
        for number, block in enumerate(found, 1):
            exec(compile(block, f"{name}.md, block {number}", "exec"), scope)


def run(block: str, scope: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullSpaceWarning)
        exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_classifier_of_the_readme_prints_what_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = next(blocks(README, "python"))
    run(recipe, {})
    *scores, last = re.findall(r"\[([\d., ]+)\]\) protection holds", capsys.readouterr().out)
    assert len(scores) == 2
    said = re.search(
        r"ends with `\[([\d., ]+)\] protection holds`; .* ends at ([\d., ]+)\.\n", README.read_text("utf-8")
    )
    assert said is not None
    ours, bare = ([float(value) for value in text.split(", ")] for text in said.groups())
    assert [float(value) for value in last.split(", ")] == pytest.approx(ours, abs=0.02)
    plain = re.sub(r"(?m)^opt = .*$", "opt = torch.optim.AdamW(model.parameters(), lr=1e-3)", recipe)
    plain = re.sub(r"(?m)^    report = .*$", "", plain).replace(", opt.verify())", ")")
    run(plain, {})
    printed = re.findall(r"\[([\d., ]+)\]", capsys.readouterr().out)[-1]
    assert [float(value) for value in printed.split(", ")] == pytest.approx(bare, abs=0.02)


def test_the_clip_recipe_of_the_readme_protects_both_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 3, (8,))
    scope = {
        "model": model,
        "tokenize": lambda prompts: torch.randint(1, 64, (len(prompts), 8)),
        "pool": [(torch.randn(8, 3, 16, 16), torch.randint(1, 64, (8, 8)))],
        "tasks": [(name, ["a", "b", "c"], [(images, labels)] * 3, [(images, labels)]) for name in ("one", "two")],
    }
    done = run(list(blocks(README, "python"))[1], scope)
    opt, report = done["opt"], done["report"]
    assert opt.verify().ok and opt.verify().worst > 0
    fates = {parameter.name: parameter.fate for parameter in report.parameters}
    assert Fate.FREE not in fates.values()
    assert {"visual.proj", "text_projection"} <= {name for name, fate in fates.items() if fate is not Fate.FROZEN}
    assert (tmp_path / "bases.safetensors").exists()


def test_the_recipe_of_the_readme_for_language_models_keeps_and_learns() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    texts = [torch.randint(low, low + 30, (4, 8)) for low in (0, 30)]
    tasks = [(str(n), [{"input_ids": text, "labels": text}] * 20) for n, text in enumerate(texts)]
    before = float(model(**tasks[1][1][0]).loss)
    pool = [{"input_ids": torch.randint(0, 60, (4, 8))}]
    scope = run(list(blocks(README, "python"))[2], {"model": model, "pool": pool, "tasks": tasks})
    assert any("pretrained" in basis.tasks for basis in scope["opt"].bases.values())
    assert scope["opt"].verify().ok and float(model(**tasks[1][1][0]).loss) < before


def test_the_readme_is_short_and_begins_with_a_first_run() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 130
    head = "\n".join(lines[:40])
    assert "pip install nullspace-optim" in head and next(blocks(README, "python")) in head


def test_the_start_page_includes_the_body_of_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert '--8<-- "README.md:body"' in (DOCS / "index.md").read_text(encoding="utf-8")
    body = text.split("--8<-- [start:body]")[1].split("--8<-- [end:body]")[0]
    assert "](" not in re.sub(r"^```.*?^```", "", body, flags=re.M | re.S), "a link would not be found from docs/"


def test_pages_for_readers_stay_short() -> None:
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in DOCS.glob("*.md")) <= 12_000


@pytest.mark.parametrize("page", sorted((DOCS / "stacks").glob("*.md")), ids=lambda page: page.stem)
def test_the_one_example_of_a_stack_is_run_by_a_test(page: Path) -> None:
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "integrations").glob("test_*.py")]
    assert len(list(blocks(page, "python"))) == 1
    assert any(f'"{page.name}"' in text and "exec(compile(example(" in text for text in tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_a_page_parse(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            if line.startswith("python -m nullspace_optim "):
                _parser().parse_args(shlex.split(line, comments=True)[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_page_lists_every_public_name_once() -> None:
    listed = re.findall(r"^::: (nullspace_optim[\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(listed) == len(set(listed))
    shown = {name.rpartition(".")[2] for name in listed}
    for name in listed:
        with contextlib.suppress(ImportError):  # a name of its own, or a package that is not installed
            module = importlib.import_module(name)
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name]
            shown |= set(getattr(module, "__all__", own))
    assert set(nullspace_optim.__all__) <= shown


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pages need mkdocs: pip install 'nullspace-optim[docs]'")
    pytest.importorskip("material", reason="pages need mkdocs-material: pip install 'nullspace-optim[docs]'")
    pytest.importorskip("mkdocstrings", reason="pages need mkdocstrings: pip install 'nullspace-optim[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    headings = {identifier.rpartition(".")[2] for identifier in re.findall(r'id="(nullspace_optim[\w.]+)"', api)}
    assert set(nullspace_optim.__all__) <= headings
    assert "When not to use it" in (tmp_path / "index.html").read_text(encoding="utf-8")
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES if page != README}
    assert pages <= {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
