"""What patches know of where things are: whether those of one thing go together, on collages of test images.

A collage has four test images of different tasks in its quarters, so its regions are known exactly. *Grouping*: how
well the self-correlation of patches in the last block of the image tower (CLIPtrase, arXiv 2407.08268: the cosine of
queries, of keys and of values, mean of the three and over heads) tells pairs of patches of one quarter from others, as
area under the curve. *Position*, the control: the same pairs in whole images, where no border runs, so that nearness
alone tells them. *Read-out*: accuracy in percent of a ridge regression from patches to the task of their quarter.
Nothing is said about segmentation by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import Config
from reference.data.tasks import Task
from reference.errors import ExperimentError
from reference.training.clip import Clip
from reference.training.features import image_features

RIDGE, WHOLE = 0.1, 8


def collages(tasks: Sequence[Task], count: int) -> tuple[Tensor, Tensor]:
    """`count` collages, uint8 `[n, 3, s, s]`, and the number of the task in each quarter, `[n, 4]`, row by row."""
    draw, made, found = torch.Generator().manual_seed(0), [], []
    for _ in range(count):
        chosen = torch.randperm(len(tasks), generator=draw)[:4]
        chosen = chosen.repeat(4)[:4]  # fewer than four tasks take turns
        tests = [tasks[number].test.images for number in chosen.tolist()]
        images = [part[torch.randint(len(part), (1,), generator=draw)].float() for part in tests]
        small = [F.interpolate(image, scale_factor=0.5, mode="area")[0] for image in images]
        made.append(torch.cat([torch.cat(small[:2], dim=2), torch.cat(small[2:], dim=2)], dim=1))
        found.append(chosen)
    return torch.stack(made).round().to(torch.uint8), torch.stack(found)


@torch.no_grad()
def patch_figures(clip: Clip, tasks: Sequence[Task], config: Config) -> dict[str, float]:
    """Grouping, position and read-out on `dense_collages` collages, two thirds of them to fit the read-out."""
    images, kinds = collages(tasks, config.dense_collages or 0)
    tokens, correlation = patches(clip, images, config)
    whole = torch.cat([task.test.drawn(WHOLE, seed=0).images[:] for task in tasks])
    plain = patches(clip, whole, config)[1]
    side = round(tokens.shape[1] ** 0.5)
    half = torch.arange(side) * 2 // side
    quarters = (2 * half[:, None] + half).flatten()
    together = quarters[:, None] == quarters
    auc, position = (sum(grouping(one, together) for one in part) / len(part) for part in (correlation, plain))
    cut, labels = 2 * len(images) // 3, kinds[:, quarters]
    fitted, asked = tokens[:cut].flatten(0, 1), tokens[cut:].flatten(0, 1)
    right = read_out(fitted, labels[:cut].flatten(), asked) == labels[cut:].flatten()
    return {"grouping": auc, "position": position, "read_out": 100 * float(right.float().mean())}


def patches(clip: Clip, images: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What the last block's attention reads at the patches `[n, p, d]`, and their self-correlation `[n, p, p]`.

    Raises:
        ExperimentError: the image tower is no transformer.
    """
    if not hasattr(clip.model.visual, "transformer"):
        raise ExperimentError("dense_collages: the model has no vision transformer, whose patches are looked at")
    layer: Any = clip.model.visual.transformer.resblocks[-1].attn  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].float()))
    try:
        image_features(clip, images, config)
    finally:
        hook.remove()
    tokens = torch.cat(seen).cpu()
    packed = F.linear(tokens, layer.in_proj_weight.float().cpu(), layer.in_proj_bias.float().cpu())
    parts = F.normalize(packed.unflatten(2, (3 * layer.num_heads, -1)), dim=3)
    return tokens, torch.einsum("nphe,nqhe->npq", parts, parts) / (3 * layer.num_heads)


def grouping(correlation: Tensor, together: Tensor) -> float:
    """Share of the pairs `[p, p]`, one `together` and one not, of which the first correlates more; half of ties."""
    above = torch.ones_like(together).triu(1)
    same, other = correlation[together & above], correlation[~together & above]
    return float(((same[:, None] > other).double() + (same[:, None] == other).double() / 2).mean())


def read_out(features: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Classes `[m]` of `others` `[m, d]` by the ridge regression of one-hot `labels` `[n]` on `features` `[n, d]`."""
    known, asked = (F.pad(part.double(), (0, 1), value=1.0) for part in (features, others))
    gram = known.T @ known / len(known) + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, known.T @ F.one_hot(labels).double() / len(known))
    return (asked @ weights).argmax(dim=1)
