"""What a small language model keeps of its first corpus while it learns a second one: one curve a method.

    python -m reference.studies.language --output DIR --figure FILE

A GPT of four blocks (width 128, table tied to the head, 2,000 byte-pair tokens) is trained on the sources of Python's
library, then fine-tuned on English of this machine (manual topics and package descriptions). Each method is followed by
interpolation with the weights before (WiSE-FT; `blend`): perplexity on held-out files of both corpora. Nothing is
downloaded; it needs the packages `tokenizers` and `peft` (LoRA and OSF).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import pydoc_data.topics
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from nullspace_optim.clip import distillation_loss
from reference.benchmarks.outcome import Outcome, Table, finish, progress
from reference.benchmarks.workload import quiet
from reference.evaluation.tables import reading
from reference.studies.ways import Way, chosen, draw, interpolation, listed, parser, stored_bytes

CONTEXT, TOKENS, ROWS, KEPT = 96, 2000, 16, 24  # of them rows a batch, and batches that ours consolidates
SHARES = (0.0, 0.2, 0.4, 0.6)
OURS = ("ours, Energy(0.99), the default", "ours, Energy(0.5)", "ours, Energy(0.5), 4e-3")
SHOWN = ("plain, 2e-3", "old data, 2 %, 2e-3", "old data, 10 %, 2e-3", "LoRA, r=8", "OSF, half kept", *OURS)
SPLITS = {"training": (0.0, 0.85), "validation": (0.85, 0.925), "test": (0.925, 1.0)}

Corpus = dict[str, Tensor]  # token numbers of each split


WAYS = listed("language")


class Block(nn.Module):
    """Attention with four heads and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, width]` to the same."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Causal language model whose token table is its head."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(TOKENS, width), nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.table.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[b, t, tokens]` of tokens `[b, t]`."""
        x = self.table(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.table.weight)


def texts() -> dict[str, list[str]]:
    """Documents of the two corpora, in a fixed order."""
    known = {str(d.metadata["Name"]): str(d.metadata.get_payload() or "") for d in importlib.metadata.distributions()}  # type: ignore[attr-defined]
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = {
        "python": [path.read_text(errors="ignore") for path in sources],
        "english": [*pydoc_data.topics.topics.values(), *(t for _, t in sorted(known.items()) if len(t) > 2000)],
    }
    for documents in found.values():
        random.Random(0).shuffle(documents)
    return found


def tokenized() -> tuple[Corpus, Corpus]:
    """Both corpora as token numbers, split by documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    found = texts()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text for documents in found.values() for text in documents], trainer)
    corpora = []
    for documents in found.values():
        numbers = torch.tensor([n for encoded in tokenizer.encode_batch(documents) for n in encoded.ids])
        size = len(numbers)
        corpora.append({split: numbers[int(a * size) : int(b * size)] for split, (a, b) in SPLITS.items()})
    return corpora[0], corpora[1]


def rows(data: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """`count` random windows of a token stream, `[count, CONTEXT + 1]`."""
    starts = torch.randint(0, len(data) - CONTEXT - 1, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, batches: int = 8) -> float:
    """Perplexity on fixed windows of `data`."""
    generator = torch.Generator().manual_seed(7)
    return math.exp(mean(float(loss_of(model, rows(data, generator, ROWS))) for _ in range(batches)))


def pretrained(corpus: Corpus, steps: int) -> GPT:
    """A model trained on the first corpus."""
    torch.manual_seed(0)
    model, generator = GPT(), torch.Generator().manual_seed(0)
    optimizer = AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        loss = loss_of(model, rows(corpus["training"], generator, ROWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            progress(f"pretraining, step {step}: loss {float(loss):.2f}")
    return model


def fine_tuned(
    way: Way, before: GPT, old: Corpus, new: Corpus, steps: int, seed: int
) -> tuple[GPT, Callable[[float], nn.Module], float, int]:
    """Fine-tune a copy of `before` on `new`: model, function of a share back, seconds of a step, bytes stored."""
    model = way.adapted(copy.deepcopy(before), seed)
    optimizer, rate = way.optimizer(model, steps)
    if way.threshold is not None:
        generator = torch.Generator().manual_seed(3)
        optimizer.consolidate([rows(old["training"], generator, ROWS)[:, :-1] for _ in range(KEPT)], progress=False)
    generator, seconds = torch.Generator().manual_seed(100 + seed), []
    for _ in range(steps):
        begun = time.process_time()
        count = way.old_rows(ROWS, generator)
        loss = loss_of(model, rows(new["training"], generator, ROWS))
        if count:
            batch = rows(old["training"], generator, count)
            if way.distil:
                targets = before(batch[:, :-1]).detach()
                old_loss = way.distil * distillation_loss(model(batch[:, :-1]), targets, temperature=1.0)
            else:
                old_loss = loss_of(model, batch)
            loss = loss + count / ROWS * old_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        seconds.append(time.process_time() - begun)
    needed = [old["training"], *(before.parameters() if way.distil else ())] if way.replay else []
    stored = stored_bytes(way, model, optimizer, needed)
    if way.rank:
        model = model.merge_and_unload().requires_grad_()  # type: ignore[operator, union-attr]
        optimizer, _ = way.optimizer(model, steps)
    return model, interpolation(model, optimizer, before.state_dict()), median(seconds), stored


def curves(options: argparse.Namespace) -> tuple[Table, dict[str, list[tuple[float, float]]]]:
    """Every method's curve, mean over the seeds (of the logarithms): a table and the points."""
    import peft  # noqa: F401  (missing, it is told now and not after minutes)

    old, new = tokenized()
    before = pretrained(old, options.pretraining)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    points: dict[str, list[tuple[float, float]]] = {}
    lines = []
    for name, way in chosen(WAYS, options.methods).items():
        progress(name)
        found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
        for seed in seeds:
            with quiet():
                _, interpolated, took, stored = fine_tuned(way, before, old, new, options.steps, seed)
                for share in SHARES:
                    model = interpolated(share)
                    found[share].append(tuple(math.log(perplexity(model, c[options.split])) for c in (old, new)))  # type: ignore[arg-type]
        points[name] = [tuple(math.exp(mean(logs)) for logs in zip(*pairs)) for pairs in found.values()]  # type: ignore
        cells, later = (f"{a:.1f} / {b:.0f}" for a, b in points[name]), "old data" if way.replay else "none"
        lines.append((name, *cells, f"{1e3 * took:.0f}", f"{stored / 1e6:.1f}", later))
    back = [f"{share:g} of the way back" for share in SHARES[1:]]
    header = ("method", "as trained", *back, "ms a step", "MB", "needs later")
    about = {**vars(options), "seeds": len(seeds)}
    about |= {name: perplexity(before, c[options.split]) for name, c in (("python", old), ("english", new))}
    note = reading("language", **about, rows=ROWS, context=CONTEXT, kept=KEPT * ROWS)
    return Table("Perplexity on Python / on English", header, tuple(lines), note), points


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    found = parser("language", __doc__, seeds="0,1,2", steps=120)
    found.add_argument("--pretraining", type=int, default=1800, metavar="STEPS")
    return found.parse_args(list(arguments))


def main(arguments: Sequence[str]) -> Outcome:
    """Run the study."""
    options = parse(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    table, points = curves(options)
    if options.figure:
        axes = ("perplexity on Python (old)", "perplexity on English (new)")
        draw({name: points[name] for name in SHOWN if name in points}, axes, options.figure)
    return finish("reference.studies.language", arguments, torch.device("cpu"), started, [table], options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
