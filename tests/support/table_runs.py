"""Small versions of the published tables' protocols."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from reference.published.networks import PreActivationBlock
from reference.published.protocols import PROTOCOLS, Protocol

Images = dict[str, tuple[Tensor, Tensor]]


def small(images: Images, **settings: object) -> Protocol:
    return replace(
        PROTOCOLS["pmnist"], **{"read": lambda root: images, "tasks": 3, "epochs": 2, "samples": 30, **settings}
    )  # type: ignore[arg-type]


class SmallResNet(nn.Module):
    """A convolution, a block and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreActivationBlock(4, 6, 2))
        self.norm = nn.BatchNorm2d(6)
        self.heads = nn.ModuleList(nn.Linear(6, 10) for _ in range(3))

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](self.norm(self.blocks(self.first(images))).relu().mean(dim=(2, 3)))  # type: ignore[no-any-return]


def nscl_protocol(images: Images, **settings: object) -> Protocol:
    changed = {"network": SmallResNet, "tasks": 3, "epochs": 2, "batch": 8, "samples": 40, **settings}
    return replace(PROTOCOLS["cifar100-resnet"], read=lambda root: images, **changed)  # type: ignore[arg-type]
