"""Run a model in evaluation mode and leave no trace: flags, buffers, random state and hooks are as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed.fsdp import reshard
from .storage import plain_parts


@contextmanager
def restored_model(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Put `model` into evaluation mode; restore train flags per module, buffers and all random state on exit, also
    after an error.

    `loader` may be a DataLoader with a `generator` of its own: its state is restored as well.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone()) for module in model.modules() for name, buffer in _own(module)
    ]
    restore_random = random_state(loader)
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        reshard(model)
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not all(map(torch.equal, plain_parts(buffer), plain_parts(value))):
                buffer.detach().copy_(value)
        restore_random()


@contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Run the body with random numbers that are the same every time; the random state is restored on exit."""
    restore = random_state(None)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        restore()


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def random_state(loader: Any) -> Any:
    """Return a callable that restores the Python, NumPy, torch (CPU and CUDA) and the loader's own random state."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else None
    owners = [
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    ]
    found = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in states:
            generator.set_state(state)

    return restore
