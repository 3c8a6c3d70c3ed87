"""Common parts of the commands: settings of a run, Ctrl-C, and exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

from reference.config import Config, load_config, parse_overrides
from reference.errors import ExperimentError
from reference.sequence import StoppedError

NAMED = ("data_root", "model", "reference_root", "methods", "tasks", "seeds", "order", "split")


class StopRequest:
    """True after Ctrl-C: the running step is finished and saved; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def __call__(self) -> bool:
        """True once Ctrl-C was pressed."""
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        print("\nstopping after this step ...", file=sys.stderr)
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def carried_out(work: Callable[[], None], advice: Callable[[], str]) -> int:
    """Do `work`; return 0, or 2 with an error's message, or 130 with `advice` if it was stopped."""
    try:
        work()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError:
        print(f"stopped and saved; {advice()}", file=sys.stderr)
        return 130
    return 0


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of data, model and schedule."""
    parser.add_argument("--preset", default="demo", help="demo (default), mini or paper")
    parser.add_argument("--data-root", help="folder with one folder of images per task")
    parser.add_argument("--model", help="folder of an open_clip model, <architecture>:<pretrained tag>, or :random")
    parser.add_argument("--reference-root", help="folder with captions.csv, for methods with a pool")
    parser.add_argument("--tasks", help="names separated by commas, in this order; default: all of --order")
    parser.add_argument("--seeds", help="numbers separated by commas")
    parser.add_argument("--order", help="I or II")
    parser.add_argument("--split", help="test or validation, on which settings are chosen")
    text = "any setting of reference/config.py; gradient_checkpointing=true, say, for less memory in training"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def read_config(options: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Config:
    """The preset with `defaults` over it, then `--set`, then the named options. The demo gets one thread."""
    if options.resume and not options.output:
        raise ExperimentError("--resume needs the --output folder of the run to go on with")
    if options.preset == "demo" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two wait for each other in many small products where other programs run
    options.output = options.output or f"runs/{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    given = {name: value for name in (*NAMED, "output") if (value := getattr(options, name)) is not None}
    return load_config(options.preset, {**(defaults or {}), **parse_overrides(options.set), **given})
