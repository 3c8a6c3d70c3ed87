"""Random damage to files and to nested state, one place at a time, made again from its seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """Return `content` with one to four random edits: a third each in the first 8 bytes, the header, anywhere."""
    dice = random.Random(seed)
    mutant = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(dice.choice((1, 1, 1, 4))):
        place = dice.randrange(min(len(mutant), (8, header, len(content))[seed % 3]))
        kind = dice.choice(("bit", "byte", "insert", "delete", "swap", "cut", "copy", "zero"))
        if kind == "bit":
            mutant[place] ^= 1 << dice.randrange(8)
        elif kind == "byte":
            mutant[place] = dice.randrange(256)
        elif kind == "insert":
            mutant.insert(place, dice.randrange(256))
        elif kind == "delete":
            del mutant[place : place + dice.choice((1, 1, 8, 100))]
        elif kind == "swap":
            other = dice.randrange(len(mutant))
            mutant[place], mutant[other] = mutant[other], mutant[place]
        elif kind == "cut":
            del mutant[max(9, place) :]
        elif kind == "copy":
            mutant[place:place] = mutant[place : place + 64]
        else:
            mutant[place : place + 16] = bytes(len(mutant[place : place + 16]))
    return bytes(mutant)


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every node below the root of a tree of dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def damaged_state(state: dict[str, Any], paths: list[Path], seed: int) -> dict[str, Any]:
    """Return a copy of `state` in which one of the nodes at `paths` is removed, replaced, renamed or edited."""
    dice = random.Random(seed)
    mutant = copy.deepcopy(state)
    *way, last = dice.choice(paths)
    holder: Any = mutant
    for key in way:
        holder = holder[key]
    kind = dice.choice(("remove", "replace", "edit", "edit", "rename", "add"))
    if kind == "remove":
        del holder[last]
    elif kind == "replace":
        holder[last] = dice.choice([None, 7, -1, 0.5, True, "", "x" * 1000, [], {}, [1], {"a": 1}, torch.zeros(2)])
    elif kind == "rename" and isinstance(holder, dict):
        holder[dice.choice([f"{last}x", 7, None, ("a",)])] = holder.pop(last)
    elif kind == "add":
        if isinstance(holder, dict):
            holder["more"] = dice.choice([None, torch.zeros(1), "x"])
        else:
            holder.insert(dice.randrange(len(holder) + 1), dice.choice(["more", 7, None]))
    else:
        holder[last] = _edited(holder[last], dice)
    return mutant


def _edited(value: Any, dice: random.Random) -> Any:
    """Return `value` with one small change: a number, a character, the type, the shape or the order."""
    if isinstance(value, Tensor):
        return _edited_tensor(value, dice)
    if isinstance(value, str):
        place = dice.randrange(len(value) + 1)
        return dice.choice(
            [value[:place] + chr(dice.randrange(32, 300)) + value[place + 1 :], value[:place], value * 2]
        )
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return dice.choice([value + 1, -value - 1, float(value), value * 10**40, str(value)])
    if isinstance(value, list):
        return dice.choice([value[::-1] + [0], value + value + ["x"], tuple(value)])
    return dice.choice([list(value), dict(list(value.items())[1:]), None])


def _edited_tensor(value: Tensor, dice: random.Random) -> Tensor:
    flat = value.clone().reshape(-1)
    if not flat.numel():
        return torch.ones(1)
    place = dice.randrange(flat.numel())
    kind = dice.choice(("bit", "nan", "scale", "shape", "type", "zero"))
    if kind == "bit":
        data = flat.view(torch.uint8)
        data[dice.randrange(data.numel())] ^= 1 << dice.randrange(8)
    elif kind == "nan" and flat.is_floating_point():
        flat[place] = dice.choice((torch.nan, torch.inf))
    elif kind == "shape":
        return flat
    elif kind == "type":
        return value.to(dice.choice([torch.float16, torch.float64, torch.int32]))
    elif kind == "zero":
        flat[place] = 0
    else:
        flat[place] = flat[place] * 3 + 1
    return flat.reshape(value.shape)
