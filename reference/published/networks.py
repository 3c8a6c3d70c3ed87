"""The networks of the published tables: GPM's two (Saha et al. 2021), without biases, and Adam-NSCL's ResNet-18."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PermutedMLP(nn.Module):
    """784-100-100-10 with ReLU and one head that all tasks share: the task is not known at test time."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(784, 100, bias=False)
        self.lin2 = nn.Linear(100, 100, bias=False)
        self.fc1 = nn.Linear(100, 10, bias=False)

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits `[n, 10]` of flat images `[n, 784]`; `task` is not looked at."""
        hidden: Tensor = self.lin2(self.lin1(images).relu()).relu()
        return self.fc1(hidden)  # type: ignore[no-any-return]


class SplitAlexNet(nn.Module):
    """Three convolutions (64 of 4x4, 128 of 3x3, 256 of 2x2), two layers of 2048, one head of ten classes a task.

    Each of the five layers is followed by batch normalisation without running statistics, ReLU and dropout (.2, .2,
    .5, .5, .5); the convolutions by max-pooling as well. The statistics of a batch serve in evaluation, so accuracy
    depends on what is in a test batch: the protocol fixes its size and order.
    """

    def __init__(self, tasks: int = 10) -> None:
        super().__init__()
        sizes, kernels = (3, 64, 128, 256), (4, 3, 2)
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(sizes[i], sizes[i + 1], kernels[i], bias=False),
                nn.BatchNorm2d(sizes[i + 1], track_running_stats=False),
                nn.ReLU(),
                nn.Dropout((0.2, 0.2, 0.5)[i]),
                nn.MaxPool2d(2),
            )
            for i in range(3)
        )
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(size, 2048, bias=False),
                nn.BatchNorm1d(2048, track_running_stats=False),
                nn.ReLU(),
                nn.Dropout(0.5),
            )
            for size in (1024, 2048)
        )
        self.heads = nn.ModuleList(nn.Linear(2048, 10, bias=False) for _ in range(tasks))

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits `[n, 10]` of images `[n, 3, 32, 32]` by the head of `task`."""
        images = images.contiguous(memory_format=torch.channels_last)  # what convolutions on a CPU are fastest with
        for block in self.convolutions:
            images = block(images)
        features = images.flatten(1)
        for layer in self.layers:
            features = layer(features)
        return self.heads[task](features)  # type: ignore[no-any-return]


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch normalisation and ReLU, beside a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        changes = stride != 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Features `[n, after, h / stride, w / stride]` of `[n, before, h, w]`."""
        active = self.norm1(x).relu()
        beside = x if self.shortcut is None else self.shortcut(active)
        inner = self.conv2(self.norm2(self.conv1(active)).relu())
        return inner + beside  # type: ignore[no-any-return]


class SplitResNet18(nn.Module):
    """The pre-activation ResNet-18 of Adam-NSCL for images of 32 x 32: `width` to `8 width` channels, one head a task.

    Normalisation has running statistics, which go on moving from task to task.
    """

    def __init__(self, tasks: int = 10, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        widths, strides = (width, width, 2 * width, 4 * width, 8 * width), (1, 2, 2, 2)
        self.blocks = nn.Sequential(
            *(
                PreActivationBlock(widths[stage + (place > 0)], widths[stage + 1], stride if place == 0 else 1)
                for stage, stride in enumerate(strides)
                for place in range(2)
            )
        )
        self.norm = nn.BatchNorm2d(8 * width)
        self.heads = nn.ModuleList(nn.Linear(8 * width, 10) for _ in range(tasks))

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits `[n, 10]` of images `[n, 3, 32, 32]` by the head of `task`."""
        features = self.norm(self.blocks(self.first(images))).relu()
        pooled = functional.adaptive_avg_pool2d(features, 1).flatten(1)
        return self.heads[task](pooled)  # type: ignore[no-any-return]


class SplitViT(nn.Module):
    """A small vision transformer for images of 32 x 32: patches of 4, four blocks of width 128, one head a task."""

    def __init__(self, tasks: int = 10, width: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))

    def features(self, images: Tensor) -> Tensor:
        """Features `[n, width]` of images `[n, 3, 32, 32]`."""
        tokens = self.patches(images).flatten(2).mT + self.positions
        return self.blocks(tokens).mean(1)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits `[n, 10]` of images `[n, 3, 32, 32]` by the head of `task`."""
        return self.heads[task](self.features(images))  # type: ignore[no-any-return]


def equiangular(classes: int, size: int) -> Tensor:
    """Unit vectors `[classes, size]` at equal angles, cosine `-1 / (classes - 1)`: a simplex; `classes <= size`."""
    corners = torch.linalg.qr(torch.randn(size, classes))[0].T
    return functional.normalize(corners - corners.mean(0), dim=1)


class OneHeadViT(SplitViT):
    """The same with one head for the classes of all tasks: cosines with vectors that begin equiangular.

    After CLDNet (arXiv 2401.09067), which keeps them there; its network, schedule and layer-wise losses are unknown.
    """

    scale = 16.0

    def __init__(self, tasks: int = 5, width: int = 128) -> None:
        super().__init__(0, width)
        self.head = nn.Linear(width, 10 * tasks, bias=False)
        self.head.weight.data.copy_(equiangular(10 * tasks, width))

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """Logits of all classes `[n, 10 tasks]`, those of `task` first, as its labels count them."""
        scores: Tensor = self.head(functional.normalize(self.features(images), dim=1))
        return self.scale * scores.roll(-10 * task, 1)
