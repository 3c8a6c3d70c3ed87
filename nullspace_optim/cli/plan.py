"""``plan``: memory and operations of protection for a model of any size, from its shapes alone."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
from collections import Counter
from fractions import Fraction
from textwrap import fill
from typing import Any

from .. import policies
from ..architectures import build
from ..errors import OptionError
from ..plan import Conditions, Prediction, Rank, Survey, by_fraction, by_rank, consolidation, on_both_sides, predict
from ..policies import FixedRank, Policy, RankBudget
from ..report import table
from ..survey import survey
from .command import add
from .text import operations, plain, size

EXAMPLES = """
python -m nullspace_optim plan --model ViT-B-16 --batch 64
python -m nullspace_optim plan --model ViT-bigG-14 --policy 'Energy(0.99)' --devices 8
python -m nullspace_optim plan --model vit_base_patch16_224 --policy 'FixedRank(64)' --json
python -m nullspace_optim plan --model LlamaConfig --batch 8 --sequence 2048 --devices 64 --vocabulary 20000
python -m nullspace_optim plan --model path/to/config.json --trainable 'model.layers.*'
"""
FRACTIONS = "1/16,1/8,1/4,1/2,3/4"
WIDE = 8192
STATES = 16  # bytes a parameter in float32 training with AdamW: value, gradient, two moments
HEADER = ["k/d", "bases", "anchors", "kept", "copies", "workspaces", "together", "a device", "a step", "of training"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add(
        commands,
        "plan",
        run,
        summary="predict memory and operations for a model, without its weights",
        description="Build a model on the meta device (no weights, no download), watch one forward pass as in a\n"
        "consolidation, and print what protection costs: bytes of bases and anchors, FLOPs of the correction beside\n"
        "those of a training step, and one consolidation. Several devices share the weights by rows (FSDP2).",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="an open_clip or timm architecture, a transformers configuration class or type, or a folder or JSON file "
        "with a configuration; open_clip:NAME, timm:NAME or transformers:NAME decides",
    )
    parser.add_argument(
        "--policy",
        default="Energy(0.999)",
        help="as in Python; the ranks of FixedRank and RankBudget are known beforehand, those of the others depend on "
        "data (default Energy(0.999))",
    )
    parser.add_argument(
        "--fractions", default=FRACTIONS, metavar="K/D,...", help=f"protected shares to print (default {FRACTIONS})"
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="devices that share the weights (FSDP2)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples of one step (default 32)")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens a sample, transformers only")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="samples consolidated (default 1000)")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="embedding rows that tasks use (default a quarter)")
    parser.add_argument("--trainable", default="*", metavar="GLOB", help="names of the parameters that are trained")
    parser.add_argument("--project", choices=["update", "both", "gradient"], default="update")
    parser.add_argument("--precision", choices=["exact", "fast"], default="exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes and FLOPs as numbers")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a configuration that is not here is an error, not a download
    policy = parse_policy(options.policy)
    conditions = Conditions(
        devices=options.devices,
        precision=options.precision,
        project=options.project,
        precise=policy.precise,
        accumulate=policy.merge == "accumulate",
        soft=type(policy).scale is not Policy.scale,
        batch_frobenius=policy.batch_frobenius,
        samples=options.samples,
        rows_used=options.vocabulary,
    )
    rules = _rules(policy, options.fractions)
    model = build(options.model, batch=options.batch, sequence=options.sequence)
    found = survey(model.model, model.run, batch=options.batch, name=model.name, trainable=options.trainable)
    if policy.from_weights:
        found = on_both_sides(found)
    predictions = {label: predict(found, rule, conditions) for label, rule in rules.items()}
    if options.json:
        print(json.dumps(_document(found, model.inputs, policy, conditions, predictions), indent=2))
    else:
        print(_page(found, model.inputs, policy, conditions, predictions))
    return 0


def parse_policy(text: str) -> Policy:
    """Return the policy that `text` calls, such as ``Energy(0.99)``; only literal arguments are read.

    Raises:
        OptionError: not a call of a known policy, or arguments it refuses.
    """
    known = {name: kind for name in policies.__all__ if _is_policy(kind := getattr(policies, name))}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in known:
            raise ValueError("no known policy")
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        policy: Policy = known[call.func.id](*positional, **named)
    except (SyntaxError, ValueError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"--policy {text!a}: expected a call such as Energy(0.99) of one of {', '.join(known)} ({error})"
        ) from error
    return policy


def _is_policy(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Policy) and kind is not Policy


def _rules(policy: Policy, fractions: str) -> dict[str, Rank]:
    """Return the rank rules to print by label: the policy's own where shapes decide, else the fractions."""
    if isinstance(policy, FixedRank):
        return {f"k={policy.k}": by_rank(policy.k)}
    if isinstance(policy, RankBudget):
        return {f"{policy.share:g}": by_fraction(policy.share)}
    rules: dict[str, Rank] = {}
    for text in fractions.split(","):
        try:
            rules[text.strip()] = by_fraction(float(Fraction(text.strip())))
        except (ValueError, ZeroDivisionError) as error:
            raise OptionError(f"--fractions {fractions!a}: {text!a} is not a share such as 1/4 in (0, 1]") from error
    return rules


def _document(
    found: Survey, inputs: str, policy: Policy, conditions: Conditions, predictions: dict[str, Prediction]
) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "model": found.model,
        "inputs": inputs,
        "policy": repr(policy),
        "conditions": dataclasses.asdict(conditions),
        "parameters": found.parameters,
        "protected": len(found.weights),
        "frozen": {item.name: item.reason for item in found.frozen},
        "free": list(found.free),
        "training_step_flops": found.step_flops,
        "forward_flops": found.forward_flops,
        "ranks": {label: dataclasses.asdict(prediction) for label, prediction in predictions.items()},
        "consolidation": dataclasses.asdict(consolidation(found, conditions)),
    }


def _page(
    found: Survey, inputs: str, policy: Policy, conditions: Conditions, predictions: dict[str, Prediction]
) -> str:
    """Return the plan for people."""
    return "\n\n".join(
        [
            _heading(found, inputs, conditions),
            _fates(found),
            table(HEADER, [_row(found, *item) for item in predictions.items()]),
            _wrapped(_notes(found, policy, conditions, predictions)),
            _wrapped(_consolidation(found, conditions)),
        ]
    )


def _heading(found: Survey, inputs: str, conditions: Conditions) -> str:
    states = STATES * found.parameters
    each = f", {size(states / conditions.devices)} on each of {conditions.devices} devices"
    return (
        f"{plain(found.model)}: {found.parameters / 1e6:,.1f} M trainable parameters; {inputs}\n"
        f"training step: {operations(found.step_flops)} (forward {operations(found.forward_flops)}); weights, "
        f"gradients and AdamW in float32 {size(states)}{each if conditions.devices > 1 else ''}"
    )


def _fates(found: Survey) -> str:
    protected = sum(weight.bytes // weight.itemsize for weight in found.weights)
    share = protected / found.parameters if found.parameters else 0.0
    lines = [f"protected: {len(found.weights)} weights, {share:.1%} of all parameters"]
    reasons = Counter(item.reason for item in found.frozen)
    lines += [f"frozen: {count} parameters {plain(reason)}" for reason, count in reasons.most_common()]
    if found.free:
        lines.append(
            f"free: {len(found.free)} parameters that this forward pass does not read ({plain(found.free[0])}, ...)"
        )
    return "\n".join(lines)


def _row(found: Survey, label: str, prediction: Prediction) -> list[str]:
    memory = prediction.memory
    parts = (memory.bases, memory.anchors, memory.kept + memory.covariances, memory.copies, memory.workspaces)
    share = prediction.step_flops / found.step_flops if found.step_flops else 0.0
    return [
        label,
        *(size(part) for part in parts),
        size(memory.total),
        size(prediction.per_device.total),
        operations(prediction.step_flops),
        f"{share:.1%}",
    ]


def _notes(found: Survey, policy: Policy, conditions: Conditions, predictions: dict[str, Prediction]) -> list[str]:
    notes = [
        "bases are shared by weights that meet the same rows; kept: frozen and full parameters, buffers"
        + (", second moments" if conditions.accumulate else "")
        + "; copies: of the weights before a step, where the difference form runs; workspaces: made at the first step"
    ]
    if conditions.devices > 1:
        notes.append(
            "a device: FSDP2 with weights and anchors sharded by rows, bases replicated; with DDP each device holds "
            f"the column 'together' and does the whole correction, {conditions.devices} times the share of its own step"
        )
    if not isinstance(policy, (FixedRank, RankBudget)):
        notes.append(f'the ranks of {policy!r} depend on the data: the table shows the range; rows="all" is assumed')
    if isinstance(policy, RankBudget):
        notes.append("RankBudget spreads its directions by energy; the table spreads them evenly")
    if any(weight.lookup for weight in found.weights):
        used = "a quarter" if conditions.rows_used is None else str(conditions.rows_used)
        notes.append(f"of every embedding {used} of the rows are taken to be used (--vocabulary)")
    full = {label: prediction.full for label, prediction in predictions.items() if prediction.full}
    notes += [f"at {label} {count} weights have no free direction left and are frozen" for label, count in full.items()]
    return notes


def _wrapped(notes: list[str]) -> str:
    return "\n".join(fill(note, 110, initial_indent="* ", subsequent_indent="  ") for note in notes)


def _consolidation(found: Survey, conditions: Conditions) -> list[str]:
    cost = consolidation(found, conditions)
    lines = [
        f"one consolidation of {cost.samples} samples: forward {operations(cost.forward_flops)}, second moments "
        f"{operations(cost.moment_flops)} (half of it with a symmetric update), eigenvectors "
        f"{operations(cost.eigh_flops)} ({cost.eigenproblems} problems, the largest {cost.largest} wide)",
        f"second moments held until its end, on every device: {size(cost.moments)}",
    ]
    if cost.largest > WIDE:
        wide = sum(moment.size > WIDE for moment in found.moments)
        lines.append(
            f"{wide} second moments are wider than {WIDE}: each takes {size(4 * cost.largest**2)} and long to solve"
        )
    return lines
