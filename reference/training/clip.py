"""The model under experiment: a CLIP of open_clip with what goes around it (tokenizer, image size, normalisation)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import Config
from reference.errors import ExperimentError


@dataclass
class Clip:
    """A CLIP model with its tokenizer; images come as uint8 `[n, 3, size, size]`."""

    model: nn.Module
    tokenizer: Callable[[Sequence[str]], Tensor]
    size: int
    mean: Tensor
    std: Tensor
    device: torch.device

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images `[n, 3, s, s]` as the float input of the image tower."""
        return ((images.to(self.device, torch.float32) / 255 - self.mean) / self.std).contiguous()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers `[len(prompts), context]`."""
        return self.tokenizer(prompts).to(self.device)

    def recompute(self) -> None:
        """Keep only each block's input for the backward pass (gradient checkpointing).

        Raises:
            ExperimentError: the model cannot do it.
        """
        if not hasattr(self.model, "set_grad_checkpointing"):
            raise ExperimentError(
                f"gradient_checkpointing=true: {type(self.model).__name__} cannot do it (it has no "
                "set_grad_checkpointing); set it to false"
            )
        self.model.set_grad_checkpointing(True)

    def train(self) -> None:
        """Put the model into training mode, except norms whose weights are fixed: their statistics stay."""
        for module in self.model.train().modules():
            if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def copy(self) -> Clip:
        """The same with a model of its own."""
        return Clip(copy.deepcopy(self.model), self.tokenizer, self.size, self.mean, self.std, self.device)


@contextmanager
def replaced(model: nn.Module, **methods: Callable[..., Tensor]) -> Iterator[None]:
    """Let `methods` stand in place of those of `model` inside this context."""
    before = {name: vars(model)[name] for name in methods if name in vars(model)}
    vars(model).update(methods)
    try:
        yield
    finally:
        for name in methods:
            delattr(model, name)
        vars(model).update(before)


def class_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """CLIP as a classifier: `exp(logit_scale) * image_features @ text_features.T`, `[n, classes]`."""
    image_features = model.encode_image(images, normalize=True)  # type: ignore[operator]
    text_features = model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    return model.logit_scale.exp() * image_features @ text_features.T  # type: ignore[operator]


def give_attention_its_layout(model: nn.Module) -> None:
    """Let every `nn.MultiheadAttention` find its input in memory as it reads it: tokens first, samples second.

    It transposes its input, and where its weights are frozen torch then multiplies sample by sample on a CPU, five
    times as slow as one product.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.batch_first:
            module.register_forward_pre_hook(_tokens_first)


def _tokens_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(args) < 3 or not args[0] is args[1] is args[2]:  # given by keyword, or attention to something else
        return args
    return (*[args[0].transpose(0, 1).contiguous().transpose(0, 1)] * 3, *args[3:])


def assemble(model: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor], device: str) -> Clip:
    """A `Clip` from an open_clip model: float32, `logit_scale` fixed (as in GNSP), on `device` (`auto`: GPU if any)."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model = model.float().to(where)
    model.logit_scale.requires_grad_(False)
    if where.type == "cpu":
        give_attention_its_layout(model)
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size  # type: ignore[union-attr]
    mean, std = (
        torch.tensor(value or default, device=where).view(3, 1, 1)
        for value, default in (
            (getattr(visual, "image_mean", None), open_clip.OPENAI_DATASET_MEAN),
            (getattr(visual, "image_std", None), open_clip.OPENAI_DATASET_STD),
        )
    )
    return Clip(model, tokenizer, int(size), mean, std, where)  # type: ignore[arg-type]


def load_clip(config: Config) -> Clip:
    """The CLIP that `config.model` names: a local folder, `<architecture>:<pretrained tag>` or `<architecture>:random`.

    Raises:
        ExperimentError: the folder or the pair does not exist, or open_clip cannot read it.
    """
    folder, untrained = Path(config.model), False
    name, _, tag = config.model.partition(":")
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise ExperimentError(
                f"model={config.model}: no open_clip_config.json in this folder; give an open_clip folder"
            )
        name, tag = f"local-dir:{folder.resolve()}", ""
    elif tag == "random" and name in open_clip.list_models():
        torch.manual_seed(0)
        tag, untrained = "", True
    elif (name, tag) not in open_clip.list_pretrained():
        raise ExperimentError(
            f"model={config.model!r} is neither a folder nor <architecture>:<pretrained tag> known to open_clip "
            "(for example ViT-B-16:openai, or ViT-B-16:random for untrained weights); check --model"
        )
    try:
        model = open_clip.create_model(name, pretrained=tag or None, require_pretrained=not untrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise ExperimentError(f"model={config.model}: open_clip cannot load it ({first}); check --model") from error
    return assemble(model, tokenizer, config.device)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor, tokens: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of `class_logits` over the classes of the task, with label smoothing; scalar."""
    logits = class_logits(model, images, tokens).float()
    return F.cross_entropy(logits, labels.to(images.device), label_smoothing=smoothing)
