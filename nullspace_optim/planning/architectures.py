"""Models by name on the meta device: open_clip and timm architectures, transformers configurations.

Nothing is downloaded and no weight is made. A name is looked for in open_clip, then in timm, then among the
configuration classes of transformers (``LlamaConfig`` or ``llama``, with its default values); a folder or a JSON file
is read as a configuration of open_clip or transformers. ``open_clip:``, ``timm:`` or ``transformers:`` before the name
decides.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError

LONGEST = 512  # tokens of a sequence unless the caller says otherwise
LIBRARIES = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}


@dataclass(frozen=True)
class Architecture:
    """A model on the meta device and a batch for it; `inputs` describes the batch, e.g. ``images 32x3x224x224``."""

    name: str
    model: nn.Module
    run: Callable[[], Any]
    inputs: str


def build(name: str, *, batch: int = 32, sequence: int | None = None) -> Architecture:
    """Return the architecture `name` on the meta device with a batch of `batch` samples.

    `sequence` is the length of token sequences: the model's own, at most 512, if not given.

    Raises:
        OptionError: the name is unknown, its library is missing, or the model cannot be built without a download.
    """
    if batch < 1 or (sequence is not None and sequence < 1):
        raise OptionError(f"batch={batch}, sequence={sequence}: expected whole numbers in [1, inf)")
    library, _, rest = name.partition(":")
    if library == "hf-hub":
        raise OptionError(f"'{name}' would have to be downloaded; download it first and give its folder")
    if library not in LIBRARIES or not rest:
        library, rest = _library_of(name), name
    model, inputs = {"open_clip": _open_clip, "timm": _timm, "transformers": _transformers}[library](
        rest, batch, sequence
    )
    described = ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in inputs.items())
    positional = library != "transformers"
    run = (lambda: model(*inputs.values())) if positional else (lambda: model(**inputs))
    shown = f"{Path(rest).name if Path(rest).exists() else rest} ({library})"
    return Architecture(shown, model, run, described)


def _library_of(name: str) -> str:
    """Return the library that has the architecture `name`."""
    path = Path(name)
    if path.exists():
        return "open_clip" if "model_cfg" in _configuration(path) else "transformers"
    known: list[str] = []
    for library, listed in (("open_clip", _open_clip_names), ("timm", _timm_names), ("transformers", _config_names)):
        names = listed()
        if name in names:
            return library
        known += names
    near = get_close_matches(name, known, 3, 0.5)
    advice = f"; similar names: {', '.join(near)}" if near else ""
    raise OptionError(
        f"no model '{name}': expected an open_clip or timm architecture, a transformers configuration class or type, "
        f"or a folder or JSON file with a configuration{advice}"
    )


def _import(library: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(library)
    except ImportError as error:
        raise OptionError(f"this model needs {library}: pip install {LIBRARIES[library]} ({error})") from error


def _open_clip_names() -> list[str]:
    return list(_import("open_clip").list_models())


def _timm_names() -> list[str]:
    return list(_import("timm").list_models()) if importlib.util.find_spec("timm") else []


def _config_names() -> list[str]:
    if not importlib.util.find_spec("transformers"):
        return []
    mapping = (
        _import("transformers").CONFIG_MAPPING_NAMES
        if hasattr(_import("transformers"), "CONFIG_MAPPING_NAMES")
        else importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    )
    return [*mapping, *mapping.values()]


def _configuration(path: Path) -> dict[str, Any]:
    """Return the JSON configuration in a file or in a folder of open_clip or transformers."""
    names = ("open_clip_config.json", "config.json")
    file = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise OptionError(f"'{path}' holds neither {' nor '.join(names)}; give a folder with one or the file itself")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"'{file}' is not a JSON configuration ({error})") from error
    if not isinstance(document, dict):
        raise OptionError(f"'{file}' holds a JSON {type(document).__name__}, expected an object")
    return document


def _made(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` makes on the meta device, ready to run as in evaluation (dropout costs no products)."""
    try:
        with torch.device("meta"), quiet():
            return make().to("meta").eval()
    except Exception as error:  # whatever a model's constructor raises is about this one name
        reason = " ".join(str(error).split())[:200]
        raise OptionError(
            f"'{name}' cannot be built on the meta device without a download ({type(error).__name__}: {reason}); "
            "give the folder of a complete configuration"
        ) from error


def _open_clip(name: str, batch: int, sequence: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build an open_clip model; a batch is `batch` images and as many texts."""
    if sequence is not None:
        raise OptionError("sequence= is for transformers models: an open_clip text has the model's own context length")
    open_clip = _import("open_clip")
    path = Path(name)
    if path.exists():
        config = _configuration(path).get("model_cfg")
        if not isinstance(config, dict):
            raise OptionError(f"'{path}' has no 'model_cfg' object: it is no configuration of open_clip")
        config = {key: value for key, value in config.items() if key != "custom_text"}
        kind = "CoCa" if "multimodal_cfg" in config else ("CustomTextCLIP" if _custom(path) else "CLIP")
        model: Any = _made(name, lambda: getattr(open_clip, kind)(**config))
    else:
        model = _made(name, lambda: open_clip.create_model(name, pretrained=None, load_weights=False, device="meta"))
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    images = torch.empty(batch, 3, height, width, device="meta")
    texts = torch.zeros(batch, model.context_length, dtype=torch.long, device="meta")
    return model, {"images": images, "texts": texts}


def _custom(path: Path) -> bool:
    config = _configuration(path)["model_cfg"]
    return bool(config.get("custom_text")) or "hf_model_name" in config.get("text_cfg", {})


def _timm(name: str, batch: int, sequence: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a timm model; a batch is `batch` images of its own input size."""
    if sequence is not None:
        raise OptionError("sequence= is for transformers models: a timm model reads images")
    timm = _import("timm")
    model: Any = _made(name, lambda: timm.create_model(name, pretrained=False))
    return model, {"images": torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")}


def _transformers(name: str, batch: int, sequence: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a transformers model from a configuration; a batch follows from the arguments of its forward."""
    library, path = _import("transformers"), Path(name)
    if path.exists():
        document = _configuration(path)
        kind = document.get("model_type")
        if kind not in library.CONFIG_MAPPING:
            raise OptionError(
                f"'{path}' has the model type {kind!r}, which this transformers does not know; upgrade it"
            )
        config = library.CONFIG_MAPPING[kind].from_dict(document)
    elif name in library.CONFIG_MAPPING:
        config = library.CONFIG_MAPPING[name]()
    else:
        config = getattr(library, name)()
    model = _made(name, lambda: _class_for(library, config)(config))
    return model, _transformers_inputs(model, config, batch, sequence)


def _class_for(library: Any, config: Any) -> Callable[[Any], nn.Module]:
    """Return the class a configuration names, else a language model if there is one for it, else the bare model."""
    for name in config.architectures or ():
        if hasattr(library, name):
            return getattr(library, name)  # type: ignore[no-any-return]
    masked = type(config) in library.MODEL_FOR_MASKED_LM_MAPPING
    for heads in (library.MODEL_FOR_CAUSAL_LM_MAPPING, library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(config) in heads and not masked:
            return heads[type(config)]  # type: ignore[no-any-return]
    return library.MODEL_MAPPING[type(config)]  # type: ignore[no-any-return]


def _transformers_inputs(model: Any, config: Any, batch: int, sequence: int | None) -> dict[str, Tensor]:
    """Return a batch: images, sound or tokens by `main_input_name`; both where two towers are compared."""
    accepted = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or LONGEST
    length = sequence or min(longest, LONGEST)
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    towers = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    inputs: dict[str, Tensor] = {}
    if model.main_input_name == "pixel_values" or towers:
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        inputs["pixel_values"] = torch.empty(batch, getattr(vision, "num_channels", 3), height, width, device="meta")
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.empty(batch, config.num_mel_bins, frames, device="meta")
    if model.main_input_name == "input_ids" or towers:
        inputs["input_ids"] = tokens
    if not inputs:
        raise OptionError(
            f"{type(model).__name__} reads '{model.main_input_name}', for which no batch is known here; build it under "
            "torch.device('meta') and call nullspace_optim.survey.survey(model, run, batch=...)"
        )
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens
    return inputs


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from logging that a model has no pretrained weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
