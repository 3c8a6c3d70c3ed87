"""A pretrained sentence encoder with its retrieval tasks and a pool of general texts; recall@1 and contrastive loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reference.errors import ExperimentError

TOKENS, TEMPERATURE = 32, 0.05
HALF = torch.cpu._is_avx512_bf16_supported()  # elsewhere bfloat16 is many times slower than float32

Pair = tuple[Tensor, Tensor]  # token numbers of a query and of its document


@dataclass(frozen=True)
class Bed:
    """The untouched encoder, the pairs of each task by split, and the pool with the encoder's embeddings `[n, d]`."""

    model: nn.Module
    tasks: dict[str, dict[str, list[Pair]]]
    pool: list[Tensor]
    known: Tensor

    def row(self, model: nn.Module, split: str) -> list[float]:
        """recall@1 of every task, in percent."""
        return [recall(model, pairs[split]) for pairs in self.tasks.values()]

    def moved(self, model: nn.Module, count: int, generator: torch.Generator) -> Tensor:
        """Mean cosine distance of `count` of the pool's embeddings to those of the untouched encoder."""
        numbers = drawn(range(len(self.pool)), count, generator)
        return 1 - (embed(model, padded([self.pool[n] for n in numbers])) * self.known[numbers]).sum(1).mean()


def load_bed(folder: Path, root: Path, names: str) -> Bed:
    """The encoder of `folder` with tasks of `root`, all where none is named; validation is the last fifth of train.

    Raises:
        ExperimentError: a package is missing, or a folder or file cannot be read.
    """
    try:
        import peft  # noqa: F401  (missing, it is told now and not after hours)
        from transformers import AutoModel, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    except (ImportError, OSError, ValueError) as error:
        told = f"--model {folder} cannot be loaded with transformers and peft ({str(error).splitlines()[0]}); give the "
        raise ExperimentError(f"{told}folder of a sentence encoder and install both packages") from error

    def tokenize(texts: list[str]) -> list[Tensor]:
        return [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]]

    tasks: dict[str, dict[str, list[Pair]]] = {}
    for name in names.split(",") if names else sorted(file.parent.name for file in root.glob("*/train.jsonl")):
        train, test = (_pairs(root / name / f"{part}.jsonl", tokenize) for part in ("train", "test"))
        tasks[name] = {"training": train[: (end := len(train) * 4 // 5)], "validation": train[end:], "test": test}
    pool = root / "pool.txt"
    if not tasks or not pool.is_file():
        raise ExperimentError(f"--data-root {root} holds no <task>/train.jsonl or no pool.txt; give the tasks' folder")
    texts = tokenize([line for line in pool.read_text(encoding="utf-8").splitlines() if line.strip()])
    return Bed(model, tasks, texts, embedded(model, texts))


def _pairs(file: Path, tokenize: Any) -> list[Pair]:
    try:
        pairs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return list(zip(*(tokenize([pair[side] for pair in pairs]) for side in ("query", "document")), strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{file}: expected an object with query and document a line ({error!r})") from error


def drawn(items: Sequence[Any], count: int, generator: torch.Generator) -> list[Any]:
    """`count` of the items without repetition, all where there are fewer."""
    return [items[n] for n in torch.randperm(len(items), generator=generator)[:count]]


def by_length(texts: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the texts in batches of about equal lengths."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    return [order[start : start + 50] for start in range(0, len(order), 50)]


def padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Inputs of the model for texts of unequal lengths, `[n, longest]` each."""
    tokens, lengths = pad_sequence(list(texts), batch_first=True), torch.tensor([len(text) for text in texts])
    return {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long()}


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last states over each text's tokens, of length one, `[n, d]`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
        states = model(**inputs).last_hidden_state.float()
    return F.normalize((states * inputs["attention_mask"][..., None]).sum(1), dim=-1)


@torch.no_grad()
def embedded(model: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    """Embeddings of all texts `[n, d]`, in their order."""
    batches = by_length(texts)
    found = torch.cat([embed(model, padded([texts[n] for n in batch])) for batch in batches])
    return found[torch.tensor([n for batch in batches for n in batch]).argsort()]


def recall(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """Percent of the queries to which their own document is the nearest of all."""
    queries, documents = (embedded(model, side) for side in zip(*pairs, strict=True))
    return 100 * float(((queries @ documents.T).argmax(1) == torch.arange(len(pairs))).float().mean())


def loss_of(model: nn.Module, pairs: Sequence[Pair]) -> Tensor:
    """Cross entropy of each query among the documents and of each document among the queries."""
    queries, documents = (embed(model, padded(side)) for side in zip(*pairs, strict=True))
    similar, own = queries @ documents.T / TEMPERATURE, torch.arange(len(pairs))
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
