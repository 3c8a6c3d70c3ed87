"""Memory for intermediate results that one correction after another uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """One buffer a device and type, as large as the largest tensor that was asked for.

    What `take` returns is valid until the next call: corrections run one after another.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of `shape` with the type and device of `like`."""
        key, size = (like.device, like.dtype), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # training uses it after an evaluation
                buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(tuple(shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
