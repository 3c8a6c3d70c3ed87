"""Small files of a CLIP: half precision, and of the token table only the rows that were trained.

A folder holds `open_clip_config.json` (open_clip's own) and `open_clip_compact.safetensors`: the state dict in float16,
with `token_rows` `[r]`, the numbers of the rows of `token_embedding.weight` `[r, width]` that are there; all others
are zero.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from reference.errors import ExperimentError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_compact.safetensors"
TABLE = "token_embedding.weight"


def load_compact(folder: Path) -> nn.Module:
    """The model in `folder`, with its whole token table.

    Raises:
        ExperimentError: a file is missing or damaged, or they do not fit each other.
    """
    try:
        shape = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        state = load_file(folder / WEIGHTS)
        model: nn.Module = open_clip.CLIP(**shape)
        rows = state.pop("token_rows").long()
        table = torch.zeros(shape["text_cfg"]["vocab_size"], state[TABLE].shape[1])
        state[TABLE] = table.index_copy(0, rows, state[TABLE].float())
        model.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        first = " ".join(str(error).split())[:300]
        raise ExperimentError(f"{folder}: {CONFIG} and {WEIGHTS} cannot be read together ({first})") from error
    return model
