"""Rows that old inputs are to a prompt, for `declare_rows`, from attention (VPT-NSP) or from tokens (PEGP).

A prompt `P` `[M, d]` is joined to the tokens, so no product with it shows which of its changes old outputs would see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..capture.declare import declare_rows
from ..errors import OptionError


def declare_prompt(prompt: Tensor, queries: Tensor, key_weight: Tensor, attention: Tensor) -> None:
    """Declare both sides of a prompt `[M, d]` (or `[1, M, d]`) that is attended to, as key and value (VPT-NSP).

    Call it in the forward pass of the attention: `queries` `[b, h, n, e]` of the old tokens, `key_weight` `[h e, d]`
    (`W_k`, applied to prompt and tokens alike), `attention` `[b, h, n, M]`, the probabilities given to the prompt.
    Right rows are `q_h W_k,h` of every head, left rows the attention. Outside `consolidate` nothing happens.
    """
    heads, size = queries.shape[1], queries.shape[3]
    rows = torch.einsum("bhne,hed->bhnd", queries.detach(), key_weight.detach().reshape(heads, size, -1))
    _declare(prompt, rows, "right")
    _declare(prompt, attention.detach(), "left")


def declare_tokens(model: nn.Module, prompt: nn.Parameter | None = None) -> RemovableHandle:
    """Declare, from now on, the embeddings that `model` gets as rows of its prompt (PEGP); returns the hook's handle.

    `model` is a PEFT model with prompt tuning, whose inner model gets `inputs_embeds` `[b, M + n, d]`: prompts and
    tokens together. For another model pass its `prompt` `[M, d]` as well. Prefix tuning writes keys and values of all
    layers into one matrix, for which no rows can be declared: its prefixes are frozen by `consolidate`.

    Raises:
        OptionError: no prompt was found.
    """
    inner: Any = model
    if prompt is None:
        encoder = getattr(model, "prompt_encoder", None)
        found = [m.embedding.weight for m in encoder.values() if hasattr(m, "embedding")] if encoder else []
        if len(found) != 1:
            raise OptionError(f"{type(model).__name__} has {len(found)} prompt embeddings, expected one; pass prompt=")
        prompt, inner = found[0], model.base_model
    target: nn.Parameter = prompt

    def declare(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds", args[0] if args else None)
        if isinstance(embeddings, Tensor) and embeddings.is_floating_point():
            declare_rows(target, embeddings.reshape(-1, embeddings.shape[-1]), "right")

    handle: RemovableHandle = inner.register_forward_pre_hook(declare, with_kwargs=True)
    return handle


def _declare(prompt: Tensor, rows: Tensor, side: Any) -> None:
    flat = rows.reshape(-1, rows.shape[-1])
    declare_rows(prompt, flat if prompt.ndim == 2 else flat[None], side)
