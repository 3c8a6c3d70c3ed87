"""``plan``: memory and operations of protection for a model of any size, from its shapes alone."""

from __future__ import annotations

import argparse
import json
import os
from fractions import Fraction

from ..covariance.sketch import SketchedCovariance
from ..errors import OptionError
from ..planning.architectures import build
from ..planning.page import document, page
from ..planning.predict import Conditions, Rank, by_fraction, by_rank, on_both_sides, predict
from ..planning.survey import survey
from ..policies.base import Policy
from ..policies.fixed_rank import FixedRank
from ..policies.parse import parse_policy
from ..policies.rank_budget import RankBudget
from ..settings import check_sketchable
from .command import add

EXAMPLES = """
python -m nullspace_optim plan --model ViT-B-16 --batch 64
python -m nullspace_optim plan --model ViT-bigG-14 --policy 'Energy(0.99)' --devices 8
python -m nullspace_optim plan --model vit_base_patch16_224 --policy 'FixedRank(64)' --json
python -m nullspace_optim plan --model LlamaConfig --batch 8 --sequence 2048 --devices 64 --vocabulary 20000
python -m nullspace_optim plan --model path/to/config.json --trainable 'model.layers.*'
"""
FRACTIONS = "1/16,1/8,1/4,1/2,3/4"


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
        default="Energy(0.99)",
        help="as in Python; the ranks of FixedRank and RankBudget are known beforehand, those of the others depend on "
        "data (default Energy(0.99))",
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
    parser.add_argument("--bias", choices=["freeze", "joint"], default="freeze", help="as in Python (default freeze)")
    parser.add_argument(
        "--sketch",
        metavar="SIZE[,ABOVE]",
        help="sketch second moments wider than ABOVE (default 8192) by SIZE rows, as SketchedCovariance does",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes and FLOPs as numbers")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a configuration that is not here is an error, not a download
    model = build(options.model, batch=options.batch, sequence=options.sequence)
    policy = parse_policy(options.policy, "--policy")
    sketch = _sketch(options.sketch)
    if sketch is not None:
        check_sketchable(policy)
    conditions = Conditions(
        devices=options.devices,
        precision=options.precision,
        project=options.project,
        precise=policy.precise,
        accumulate=policy.merge == "accumulate",
        joint=policy.joint,
        soft=type(policy).scale is not Policy.scale,
        batch_frobenius=policy.batch_frobenius,
        samples=options.samples,
        rows_used=options.vocabulary,
    )
    rules = _rules(policy, options.fractions)
    found = survey(
        model.model, model.run, batch=options.batch, name=model.name, trainable=options.trainable, bias=options.bias,
        sketch=sketch,
    )  # fmt: skip
    if policy.from_weights:
        found = on_both_sides(found)
    predictions = {label: predict(found, rule, conditions) for label, rule in rules.items()}
    if options.json:
        print(json.dumps(document(found, model.inputs, policy, conditions, predictions), indent=2))
    else:
        print(page(found, model.inputs, policy, conditions, predictions))
    return 0


def _sketch(text: str | None) -> SketchedCovariance | None:
    """Return the sketch of ``--sketch SIZE`` or ``--sketch SIZE,ABOVE``."""
    if text is None:
        return None
    try:
        return SketchedCovariance(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"--sketch {text!a}: expected SIZE or SIZE,ABOVE such as 1024,8192") from error


def _rules(policy: Policy, fractions: str) -> dict[str, Rank]:
    """Return the rank rules to print by label: the policy's own where shapes decide, else the fractions."""
    if isinstance(policy, (FixedRank, RankBudget)) and fractions != FRACTIONS:
        raise OptionError(
            f"--fractions {fractions!a}: --policy {type(policy).__name__} says how many directions; give one"
        )
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
