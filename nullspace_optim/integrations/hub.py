"""A model folder with its bases beside the weights, and the same on the Hugging Face Hub.

`save_pretrained` writes both and a section for the model card, `load_bases` reads the bases of a folder or repository.
"""

from __future__ import annotations

import glob
import importlib
import re
from collections.abc import Iterator
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..distributed.failures import raise_on_all_ranks
from ..distributed.fsdp import sharded_modules
from ..distributed.group import rank
from ..errors import BasisFileError, OptionError
from ..files.rename import match_store
from ..formatting import name_some, plain
from ..model.find import unwrap as unwrap_model
from ..model.names import named_parameters
from ..subspace.basis import Basis, Fate, Subspace
from .unwrap import unwrap

BASES_FILE = "nullspace_bases.safetensors"
CARD = "README.md"
BEGIN, END = "<!-- nullspace_optim: begin -->", "<!-- nullspace_optim: end -->"


def save_pretrained(
    model: nn.Module,
    optimizer: Any,
    folder: str | PathLike[str],
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
) -> str | None:
    """Write the weights as `model.save_pretrained(folder)` does, the bases beside them and a section of the model card.

    The bases come first: if the weights then fail to be written, the two do not fit, and the next step says so. Of
    several processes (DDP) all must call it; rank 0 writes and pushes.

    Args:
        model: what is saved, a model or a PEFT adapter; it holds the parameters that `optimizer` protects.
        optimizer: the `NullSpaceOptimizer`, or what a framework made of it.
        folder: created if it is missing; an existing model card keeps its text.
        push_to_hub: upload the files that were written; the repository is created if it is missing.
        repo_id: the repository, ``"owner/name"``; the name of `folder` by default.
        private: whether a repository that is created is private; the Hub's default if not given.

    Returns:
        The address of the commit, `None` if nothing was pushed.

    Raises:
        OptionError: `model` has no `save_pretrained`, lacks protected parameters or is sharded.
        StaleAnchorError: a protected weight was edited outside the optimizer (a merge: see `reanchor`).
        ImportError: huggingface_hub, which a push needs, is not installed.
    """
    wrapper, inner, target = unwrap(optimizer), unwrap_model(model), Path(folder)
    with raise_on_all_ranks():
        _check(wrapper, inner)
        for option, value in (("repo_id", repo_id), ("private", private)):
            if value is not None and not push_to_hub:
                raise OptionError(f"{option}={value!r} without push_to_hub=True: nothing would be pushed")
        api = _hub().HfApi() if push_to_hub else None
        target.mkdir(parents=True, exist_ok=True)
    before = _written(target)
    wrapper.save(target / BASES_FILE)
    card = model_card(wrapper)
    with raise_on_all_ranks():
        if rank() != 0:
            return None
        inner.save_pretrained(target)  # type: ignore[operator]
        path = target / CARD
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(_with_section(text, card), encoding="utf-8")
        if api is None:
            return None
        new = [glob.escape(name) for name, time in _written(target).items() if before.get(name) != time]
        created = api.create_repo(repo_id or target.resolve().name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=created.repo_id, folder_path=target, allow_patterns=new, commit_message="Weights with their bases"
        )
        return str(commit.commit_url)


def load_bases(optimizer: Any, source: str | PathLike[str], *, revision: str | None = None) -> None:
    """Load the bases of a folder, or of a repository on the Hub, that `save_pretrained` wrote.

    Load the weights first. Every anchor is compared with them before the next step.

    Args:
        optimizer: the `NullSpaceOptimizer` around the loaded model, or what a framework made of it.
        source: an existing folder, or else a repository, ``"owner/name"``.
        revision: branch, tag or commit of the repository.

    Raises:
        BasisFileError: there is no basis file in `source`, or it does not fit the model.
        OptionError: `source` is neither a folder nor the name of a repository that can be found.
        ImportError: huggingface_hub, which a repository needs, is not installed.
    """
    path = Path(source) / BASES_FILE
    if not Path(source).is_dir():
        path = Path(_download(str(source), revision))
    elif not path.exists():
        raise BasisFileError(f"{plain(source)} holds no {BASES_FILE}: {_UNPROTECTED}")
    unwrap(optimizer).load(path)


_UNPROTECTED = (
    "its weights were saved without bases. Write both with save_pretrained(model, optimizer, folder), or consolidate "
    "the old tasks' data again"
)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install huggingface_hub") from error


def _download(repository: str, revision: str | None) -> str:
    hub = _hub()
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        path: str = hub.hf_hub_download(repository, BASES_FILE, revision=revision)
    except errors.LocalEntryNotFoundError:  # offline and not in the cache, which its text says
        raise
    except errors.EntryNotFoundError as error:
        raise BasisFileError(f"repository {plain(repository)} holds no {BASES_FILE}: {_UNPROTECTED}") from error
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise OptionError(
            f"load_bases({plain(repository)!r}): no folder here, and no repository of that name can be read"
        ) from error
    return path


def _check(wrapper: Any, model: nn.Module) -> None:
    """Refuse a model that cannot be written with the bases of `wrapper`."""
    kind = type(model).__name__
    if not callable(getattr(model, "save_pretrained", None)):
        raise OptionError(
            f"{kind} has no save_pretrained: write its weights as its library does (timm.models.save_for_hf, "
            f"open_clip.push_to_hf_hub, torch.save) and the bases with opt.save(folder / {BASES_FILE!r})"
        )
    if sharded_modules(model):
        raise OptionError(
            f"{kind} is sharded (FSDP2): gather its weights with torch's get_model_state_dict and write the bases with "
            f"opt.save(folder / {BASES_FILE!r}) on all ranks"
        )
    core, named = wrapper._core, named_parameters(model)
    missing = [name for name in match_store(core.store, named) if name not in named] if core.mode is None else []
    if missing:
        raise OptionError(
            f"the bases protect {len(missing)} parameters that this {kind} does not hold ({name_some(missing)}). After "
            "a merge an adapter's bases have nothing left to protect: wrap the merged model's own parameters and "
            "consolidate the old tasks' data; otherwise save the model that was trained"
        )
    core.follow_replaced()
    if not core.wrapped(model):
        raise OptionError(f"this {kind} holds none of the optimizer's parameters: save the model that it trains")


def _written(folder: Path) -> dict[str, int]:
    """Return the files below `folder` and when they were written; hidden ones are left out."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {n.as_posix(): (folder / n).stat().st_mtime_ns for n in names if not any(p[0] == "." for p in n.parts)}


def _with_section(text: str, section: str) -> str:
    """Return the model card `text` with `section` at its end, or in the place of the section it has already."""
    found = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
    if found.search(text):
        return found.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n" if text.strip() else f"{section}\n"


def model_card(optimizer: Any) -> str:
    """Return a Markdown section for the model card: tasks, policy, what is kept exactly and what is not.

    Names of tasks are data: they are escaped.
    """
    wrapper = unwrap(optimizer)
    lines = [BEGIN, "", "## What this model keeps", ""]
    tasks = wrapper._core.store.tasks
    if not tasks:
        lines += ["Trained with `nullspace_optim`; no task has been consolidated, so nothing is protected.", "", END]
        return "\n".join(lines)
    lines += [
        f"Trained with `nullspace_optim`; {len(tasks)} task{'s' * (len(tasks) > 1)} consolidated, in this order. "
        f"`{BASES_FILE}` holds what further training must keep.",
        "",
        "| task | policy | batches seen |",
        "|---|---|---|",
        *(f"| {_cell(task['name'])} | {_cell(task['policy'])} | {_cell(task['batches'])} |" for task in tasks),
        "",
        *(f"* {line}" for line in (*_exact(wrapper), *_inexact(wrapper))),
        "",
        "To go on training without losing it:",
        "",
        "```python",
        "from nullspace_optim.integrations.hub import load_bases",
        "",
        "opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-5), model)  # with the settings of before",
        'load_bases(opt, "this repository or folder")',
        "```",
        "",
        END,
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Return `value` as text of a table that is neither markup nor the end of the section."""
    return re.sub(r"([\\`*_|\[\]~#])", r"\\\1", escape(plain(value), quote=False))


def _sides(wrapper: Any) -> list[Subspace]:
    return [side for basis in wrapper.bases.values() for side in basis.subspaces.values()]


def _leaks(wrapper: Any) -> bool:
    return bool(wrapper._core.options.project == "gradient")


def _soft(wrapper: Any) -> bool:
    return any(side.scale is not None for side in _sides(wrapper))


def _exact(wrapper: Any) -> Iterator[str]:
    """Yield what is kept as it was."""
    bases: list[Basis] = list(wrapper.bases.values())
    if wrapper._core.mode is not None:
        yield "**Exact**: the backbone, and the experts and routers of finished tasks, are frozen."
        return
    kept = [basis for basis in bases if basis.fate is Fate.PROTECTED]
    still = sum(basis.fate in (Fate.FULL, Fate.FROZEN) for basis in bases)
    if kept and not _leaks(wrapper) and not _soft(wrapper):
        share = 1 - sum(basis.free_share for basis in kept) / len(kept)
        yield (
            f"**Exact** up to float rounding: the response of {len(kept)} weights along the kept input directions "
            f"({share:.0%} of each on average). Largest relative change since they were consolidated: "
            f"{wrapper.verify().worst:.1e}."
        )
    if still:
        yield f"**Exact** bit for bit: {still} parameters that can no longer change."


def _inexact(wrapper: Any) -> Iterator[str]:
    """Yield what may have moved, or may move."""
    core = wrapper._core
    if _leaks(wrapper):
        yield "**Not exact**: gradients were projected as published methods do; kept directions leak with every step."
    if _soft(wrapper):
        yield "**Not exact**: the policy protects softly; kept directions may move by the share that it lets through."
    if core.mode is None and core.options.policy.merge == "accumulate":
        yield "**Not exact**: the policy weighs all tasks together; a later one may give up directions of earlier ones."
    energy = min(core.store.energy(str(task["name"])) for task in core.store.tasks)
    if core.mode is None:
        yield (
            "**Not exact**: outputs on the tasks' data. They may move by what the policy cut off (at least "
            f"{energy:.2%} of a weight's input energy is kept). Inputs that were never consolidated have no protection."
        )
    bases = wrapper.bases
    free = sum(name not in bases or bases[name].fate is Fate.FREE for name in core.parameters)
    if free:
        yield f"**Not protected**: {free} parameters without a basis."
    yield "Quantization, merging and training without these bases change weights past all of this."
