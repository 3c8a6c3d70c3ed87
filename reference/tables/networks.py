"""The two networks of the published tables, without biases, exactly as GPM (Saha et al. 2021) trained them."""

from __future__ import annotations

from torch import Tensor, nn


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
        for block in self.convolutions:
            images = block(images)
        features = images.flatten(1)
        for layer in self.layers:
            features = layer(features)
        return self.heads[task](features)  # type: ignore[no-any-return]
