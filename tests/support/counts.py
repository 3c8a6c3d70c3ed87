"""Counted floating-point operations, those of products in place included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def product_flop(target: Any, left: Any, right: Any, **_: Any) -> int:
    """Count `target += left @ right` `[b, m, k] @ [b, k, n]`."""
    batch, m, k = left
    return int(2 * batch * m * k * right[2])


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count products, those in place as well, with attention as products."""
    in_place: Any = torch.ops.aten.baddbmm_
    counts = {in_place: product_flop}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=counts) as mode:
        yield mode
