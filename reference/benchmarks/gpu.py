"""Everything that is measured on one GPU, in at most nine minutes: one command, most valuable parts first.

    python -m reference.benchmarks.gpu --output DIR

Each part is a command of its own with a time limit; its result is written as soon as it is done, and one that fails or
runs out of time does not stop the rest. `--toy` runs every part in small, on a CPU as well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import AdamW

from nullspace_optim import Energy, NullSpaceOptimizer
from reference.benchmarks.outcome import Table, finish, progress
from reference.benchmarks.workload import quiet, seconds

BUDGET = 540  # seconds
# Name, seconds it may take, module, arguments, what stands in their place with --toy (nothing: left out).
PARTS: tuple[tuple[Any, ...], ...] = tuple(
    (name, *(part[key] for key in ("limit", "module", "full", "toy")))
    for name, part in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
)


def causal_model(toy: bool, device: torch.device) -> nn.Module:
    """A Llama with random weights: 1.1 billion parameters, or a toy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    if toy:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=200 if toy else 32000, max_position_embeddings=512, **size)
    with torch.device(device):
        return LlamaForCausalLM(config)


def language(toy: bool, device: torch.device) -> Table:
    """Step and consolidation of a large language model: seconds, ratio, peak memory."""
    length, rows, samples = (16, 2, 4) if toy else (512, 8, 64)
    model = causal_model(toy, device)
    draw = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (samples, length), generator=draw, device=device)  # type: ignore[union-attr, arg-type]
    base = AdamW(model.parameters(), lr=1e-6, foreach=False)

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=tokens[:rows], labels=tokens[:rows]).loss.backward()
        optimizer.step()

    def timed(optimizer: torch.optim.Optimizer) -> float:
        step(optimizer)
        return min(seconds(lambda: step(optimizer), device) for _ in range(3))

    plain = timed(base)
    batches = [{"input_ids": part} for part in tokens.split(rows)]
    with quiet():
        optimizer = NullSpaceOptimizer(base, model, policy=Energy(0.95))
        spent = seconds(lambda: optimizer.consolidate(batches, progress=False), device)
    protected = timed(optimizer)
    kept = optimizer.verify().worst
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    row = (
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}", f"{plain:.3f}", f"{protected:.3f}",
        f"{protected / plain:.2f}", f"{spent:.1f}", f"{optimizer.capacity().mean:.0%}", f"{kept:.1e}", f"{peak:.1f}",
    )  # fmt: skip
    header = ("10^9 weights", "step, s", "protected, s", "ratio", "consolidation, s", "free", "kept drift", "peak, GiB")
    note = f"Random weights and tokens; {rows} rows of {length} tokens a step, {samples} consolidated, Energy(0.95)."
    return Table("A Llama", header, (row,), note)


def run_parts(options: argparse.Namespace) -> int:
    """Run every part that the time allows; return the number of those that failed."""
    started, failed = time.monotonic(), 0
    Path(options.output).mkdir(parents=True, exist_ok=True)
    for name, limit, module, full, toy in PARTS:
        left = BUDGET - (time.monotonic() - started)
        chosen = toy if options.toy else full
        if not chosen or (options.parts and name not in options.parts.split(",")):
            continue
        place = Path(options.output) / name if module == "reference.run" else Path(options.output)
        command = [sys.executable, "-m", module, *chosen.split(), "--output", str(place)]
        try:
            done = subprocess.run(command, timeout=max(1.0, min(limit, left)), check=False, stdout=subprocess.DEVNULL)
            outcome = "done" if done.returncode == 0 else f"failed with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {min(limit, left):.0f} s"
        failed += outcome != "done"
        progress(f"{name}: {outcome}, {time.monotonic() - started:.0f} s since the start")
    return failed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--parts", default="", help=f"which of {','.join(part[0] for part in PARTS)}; all by default")
    parser.add_argument("--toy", action="store_true", help="every part in small")
    parser.add_argument("--language", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str]) -> int:
    """Run all parts, or the one that is this module's own."""
    options = parse(arguments)
    if not options.language:
        return 1 if run_parts(options) else 0
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    finish("gpu", arguments, device, started, [language(options.toy, device)], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
