"""Output of ``plan``: a page of text, or one JSON object."""

from __future__ import annotations

import dataclasses
from collections import Counter
from textwrap import fill
from typing import Any

from ..formatting import operations, plain, size, table
from ..policies.base import Policy
from ..policies.fixed_rank import FixedRank
from ..policies.rank_budget import RankBudget
from .predict import Conditions, Prediction, consolidation
from .shapes import Survey

WIDE = 8192
STATES = 16  # bytes a parameter in float32 training with AdamW: value, gradient, two moments
PARTS = ["bases", "anchors", "kept", "copies", "workspaces"]
HEADER = ["k/d", *PARTS, "total", "per device", "FLOPs / step", "% of training"]


def document(
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


def page(found: Survey, inputs: str, policy: Policy, conditions: Conditions, predictions: dict[str, Prediction]) -> str:
    """Return the plan for people."""
    return "\n\n".join(
        [
            _heading(found, inputs, conditions),
            _fates(found),
            table(HEADER, [_row(found, *item) for item in predictions.items()]),
            _wrapped(_notes(found, policy, conditions, predictions)),
            _wrapped(_consolidation(found, conditions, predictions)),
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
            "per device: FSDP2 with weights and anchors sharded by rows, bases replicated; with DDP each device holds "
            f"the column 'total' and does the whole correction, {conditions.devices} times the share of its own step"
        )
    if not isinstance(policy, (FixedRank, RankBudget)):
        notes.append(f'the ranks of {policy!r} depend on the data: the table shows the range; rows="all" is assumed')
    if isinstance(policy, RankBudget):
        notes.append("RankBudget spreads its directions by energy; the table spreads them evenly")
    if any(weight.joint for weight in found.weights):
        notes.append("bias=joint: a bias is one more input of its weight, which takes the anchor form at any rank")
    if any(weight.lookup for weight in found.weights):
        used = "a quarter" if conditions.rows_used is None else str(conditions.rows_used)
        notes.append(f"of every embedding {used} of the rows are taken to be used (--vocabulary)")
    full = {label: prediction.full for label, prediction in predictions.items() if prediction.full}
    notes += [f"at {label} {count} weights have no free direction left and are frozen" for label, count in full.items()]
    return notes


def _wrapped(notes: list[str]) -> str:
    return "\n".join(fill(note, 110, initial_indent="* ", subsequent_indent="  ") for note in notes)


def _consolidation(found: Survey, conditions: Conditions, predictions: dict[str, Prediction]) -> list[str]:
    cost, ranks = consolidation(found, conditions), predictions.values()
    solving = [rank.solving_bytes for rank in ranks]
    more = " to ".join(dict.fromkeys(map(size, (min(solving), max(solving)))))
    lines = [
        f"one consolidation of {cost.samples} samples: forward {operations(cost.forward_flops)}, second moments "
        f"{operations(cost.moment_flops)} (9/16 of it on a CPU), eigenvectors "
        f"{operations(cost.eigh_flops)} ({cost.eigenproblems} problems, the largest {cost.largest} wide) that read "
        f"{size(cost.eigh_bytes)} of memory, bases at most {operations(max(r.polish_flops for r in ranks))}",
        f"second moments held until its end, on every device: {size(cost.moments)}; then finding directions takes "
        f"{more}, by their number, and up to {size(max(*solving, cost.later))} in later tasks",
    ]
    if cost.largest > WIDE:
        wide = sum(moment.size > WIDE for moment in found.moments)
        held = [moment for moment in found.moments if moment.size > WIDE and not moment.sketched]
        if held:
            lines.append(
                f"{len(held)} of {wide} second moments wider than {WIDE} are held whole: each takes "
                f"{size(4 * cost.largest**2)} and long to solve; --sketch 1024 measures them in memory linear in d"
            )
    sketched = [moment for moment in found.moments if moment.sketched]
    if sketched:
        lines.append(
            f"{len(sketched)} second moments are sketched by {sketched[0].sketched} rows each: at most "
            f"{sketched[0].sketched - 1} new directions a task there, and energies are lower bounds"
        )
    return lines
