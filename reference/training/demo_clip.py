"""The demo's model: a tiny CLIP that is trained in the run on the class names in another style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import open_clip
import torch
from torch import Tensor

from reference.config import Config
from reference.data.demo import SIZE
from reference.data.tasks import Task
from reference.training.clip import Clip, assemble, classification_loss
from reference.training.steps import train


class WordTokenizer:
    """Token numbers of whole words, with start and end marks; the end mark is the largest number, as CLIP expects."""

    context = 10

    def __init__(self, sentences: Sequence[str]) -> None:
        words = sorted({word for sentence in sentences for word in sentence.split()})
        self.number = {word: n for n, word in enumerate(words, start=1)}
        self.start, self.end = len(words) + 1, len(words) + 2

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """`[len(sentences), context]`, int64, padded with 0."""
        rows = torch.zeros(len(sentences), self.context, dtype=torch.int64)
        for row, sentence in zip(rows, sentences):
            numbers = [self.start, *(self.number[word] for word in sentence.split()), self.end]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


def pretrained_clip(config: Config, pretraining: Task, seed: int) -> Clip:
    """A CLIP of 0.6 M parameters, both towers transformers, trained on `pretraining` for a fraction of a minute."""
    tokenizer = WordTokenizer(pretraining.class_names)
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": SIZE, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32},
        text_cfg={
            "context_length": tokenizer.context, "vocab_size": tokenizer.end + 1, "width": 64, "heads": 2, "layers": 2,
        },
    )  # fmt: skip
    clip = assemble(model, tokenizer, config.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.pretrain_rate, fused=True)
    schedule = replace(config, iterations=config.pretrain_iterations, learning_rate=config.pretrain_rate)

    def loss(images: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
        return classification_loss(model, images, labels, tokens, config.label_smoothing)

    train(clip, optimizer, pretraining, schedule, loss, seed=seed)
    return clip
