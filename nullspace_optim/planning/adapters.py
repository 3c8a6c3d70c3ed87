"""LoRA adapters and prompts on a model of the meta device, so that what they cost can be planned (needs PEFT)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .architectures import Architecture, quiet

LORA = "*.lora_[AB].*"  # names of the parameters that `with_lora` makes
PROMPT = "*prompt_encoder.*"


def with_lora(architecture: Architecture, rank: int, pattern: str = "*") -> Architecture:
    """Return `architecture` with a LoRA of `rank` beside every linear layer whose weight's name matches `pattern`.

    The layers inside `nn.MultiheadAttention` are left out: it never calls them.

    Raises:
        OptionError: PEFT is missing, the rank is no positive number, or no linear layer matches.
    """
    if rank < 1:
        raise OptionError(f"a LoRA of rank {rank}: expected a whole number in [1, inf)")
    linear = list(_linear(architecture.model))
    names = [name for name in linear if fnmatch(f"{name}.weight", pattern)]
    if not names:
        known = ", ".join(linear[:3]) or "none"
        raise OptionError(f"no linear layer's weight matches {pattern!r}; linear layers begin with: {known}")
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with _on_meta():
        peft.inject_adapter_in_model(config, architecture.model)
    return replace(architecture, name=f"{architecture.name} with LoRA of rank {rank} beside {len(names)} layers")


def _linear(model: nn.Module) -> Iterator[str]:
    """Yield the names of the layers that PEFT can put a LoRA beside."""
    inside = {id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
              for part in module.children()}  # fmt: skip
    for name, module in model.named_modules():
        if id(module) not in inside and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            yield name


def with_prompt(architecture: Architecture, tokens: int, declare: Callable[[Any], Any]) -> Architecture:
    """Return a language `architecture` with a learned prompt `[tokens, d]` (PEFT's prompt tuning).

    `declare` is `declare_tokens`, which says what the prompt's rows are.

    Raises:
        OptionError: PEFT is missing, the model is no language model of transformers, or the number is not positive.
    """
    if tokens < 1:
        raise OptionError(f"a prompt of {tokens} tokens: expected a whole number in [1, inf)")
    inputs = architecture.arguments
    if "input_ids" not in inputs or "pixel_values" in inputs:
        raise OptionError(
            f"{architecture.name} is no language model of transformers, the only kind whose prompts are known here; "
            "survey a model of your own with nullspace_optim.survey.survey"
        )
    peft = _peft()
    kind = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    name = type(architecture.model).__name__
    task = next((task for ending, task in kind.items() if name.endswith(ending)), "FEATURE_EXTRACTION")
    with _on_meta():
        model = peft.get_peft_model(
            architecture.model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=tokens)
        )
    declare(model)
    return replace(
        architecture,
        name=f"{architecture.name} with a prompt of {tokens} tokens",
        model=model,
        run=lambda: model(**inputs),
    )


def _peft() -> Any:
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise OptionError(f"LoRA and prompts are those of PEFT: pip install peft ({error})") from error
    return peft


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
