"""The published tables: data as the papers read it, networks of the published sizes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils import shuffle
from torch.nn import functional

from reference.errors import ExperimentError
from reference.published.data import (
    MNIST_FILES,
    PermutedMNIST,
    SplitCIFAR100,
    _read_webp,
    read_cifar100,
    read_mnist,
)
from reference.published.methods import METHODS
from reference.published.networks import OneHeadViT, PermutedMLP, SplitAlexNet, SplitResNet18, equiangular
from reference.published.protocols import PROTOCOLS
from reference.published.training import augmented

# data


def test_mnist_is_read_in_full_and_permuted_as_in_the_papers_loader(data_root: Path) -> None:
    images = read_mnist(data_root)
    assert images["train"][0].shape == (60_000, 784) and images["test"][1].bincount().min() > 800
    tasks = PermutedMNIST(images, seed=2)
    seeds = shuffle(np.arange(10), random_state=2)
    for task in (0, 7):
        pixels, labels = tasks.part(task, "train")
        assert pixels.shape == (54_000, 784) and len(tasks.part(task, "validation")[1]) == 6_000
        image = (images["train"][0][6_000].float() / 255 - 0.1307) / 0.3081
        expected = shuffle(image.numpy(), random_state=int(seeds[task]) * 100 + task)
        assert np.allclose(pixels[0].numpy(), expected, atol=1e-6) and labels[0] == images["train"][1][6_000]
    more = PermutedMNIST(images, seed=2, held_out=0.25)
    assert [len(more.part(7, part)[1]) for part in ("train", "validation", "test")] == [45_000, 15_000, 10_000]  # type: ignore[arg-type]


def test_cifar100_is_split_into_ten_tasks_of_ten_classes(data_root: Path) -> None:
    test = _read_webp(data_root / "cifar100" / "test.npz", 10_000)
    tasks = SplitCIFAR100({"train": test, "test": test}, seed=1)
    train, validation, whole = (tasks.part(3, part) for part in ("train", "validation", "test"))  # type: ignore[arg-type]
    assert [len(part[1]) for part in (train, validation, whole)] == [950, 50, 1_000]
    assert sorted(set(whole[1].tolist())) == list(range(10))
    more = SplitCIFAR100({"train": test, "test": test}, seed=1, held_out=0.2)
    split = [more.part(3, part)[0] for part in ("validation", "train", "test")]  # type: ignore[arg-type]
    assert [len(images) for images in split] == [200, 800, 1_000] and torch.equal(split[0][:50], validation[0])
    assert torch.equal(torch.cat(split[:2])[50:], train[0])
    both = torch.cat([train[0], validation[0]])
    assert both.mean().abs() < 0.3 and 0.8 < both.std() < 1.2
    assert torch.allclose(both.double().mean(), whole[0].double().mean())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, r"t10k-labels-idx1-ubyte\.gz is missing"),
        ("t10k-labels-idx1-ubyte", b"no gzip", "cannot be unpacked"),
        (
            "t10k-labels-idx1-ubyte",
            gzip.compress(b"\0\0\x08\x01\0\0\0\1\7", mtime=0),
            "9 bytes and number 2049, expected 10008",
        ),
    ],
    ids=["missing", "no gzip", "cut off"],  # from the values, an id would differ between workers
)
def test_missing_and_damaged_files_of_mnist_are_named(
    tmp_path: Path, name: str | None, content: bytes | None, message: str
) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for images, labels, count in MNIST_FILES.values():
        header = (2051).to_bytes(4, "big") + bytes(12)
        (folder / f"{images}.gz").write_bytes(gzip.compress(header + bytes(count * 784), 1))
        if images.startswith("train"):
            (folder / f"{labels}.gz").write_bytes(gzip.compress((2049).to_bytes(4, "big") + bytes(4 + count), 1))
    if name and content:
        (folder / f"{name}.gz").write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        read_mnist(tmp_path)


def test_missing_and_damaged_files_of_cifar_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="neither cifar100"):
        read_cifar100(tmp_path)
    (tmp_path / "cifar100").mkdir()
    with pytest.raises(ExperimentError, match=r"train\.npz is missing"):
        read_cifar100(tmp_path)
    np.savez(tmp_path / "cifar100" / "train.npz", webp=np.zeros(3, np.uint8), end=np.array([3]), fine=np.zeros(1))
    with pytest.raises(ExperimentError, match=r"train\.npz is damaged"):
        read_cifar100(tmp_path)
    (tmp_path / "cifar100").rename(tmp_path / "cifar-100-python")
    with pytest.raises(ExperimentError, match="cifar-100-python"):
        read_cifar100(tmp_path)


# networks and training


def test_networks_have_the_published_sizes_and_no_biases() -> None:
    mlp, alexnet = PermutedMLP(), SplitAlexNet()
    assert [tuple(p.shape) for p in mlp.parameters()] == [(100, 784), (100, 100), (10, 100)]
    shapes = [tuple(p.shape) for p in alexnet.parameters() if p.ndim > 1]
    assert shapes[:5] == [(64, 3, 4, 4), (128, 64, 3, 3), (256, 128, 2, 2), (2048, 1024), (2048, 2048)]
    assert shapes[5:] == [(10, 2048)] * 10 and not list(alexnet.buffers())
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(alexnet.eval()(images, 0), alexnet(images, 1))
    assert not torch.allclose(alexnet(images, 0)[:2], alexnet(images[:2], 0))  # the statistics are the batch's own


def test_the_resnet_has_the_published_sizes_and_running_statistics() -> None:
    model = SplitResNet18()
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 4]
    assert len(shapes) == 20 and shapes[0] == (64, 3, 3, 3) and shapes[-1] == (512, 512, 3, 3)
    assert [s for s in shapes if s[2:] == (1, 1)] == [(128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1)]
    body = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("heads"))
    assert body == 11_159_232 + 2 * 3_904  # convolutions, norms
    assert model.norm.running_mean is not None
    seen = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32), 4).shape == (2, 10) and seen == [(2, 512, 4, 4)]
    hook.remove()


def test_augmentation_is_a_crop_of_the_padded_image_sometimes_mirrored() -> None:
    images = torch.rand(40, 2, 6, 6) + 1
    torch.manual_seed(3)
    made = augmented(images, padding=2)
    kinds = set()
    for image, result in zip(images, made):
        padded = functional.pad(image, (2, 2, 2, 2))
        windows = {(i, j): padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
        found = [(False, *at) for at, window in windows.items() if torch.equal(window, result)]
        found += [(True, *at) for at, window in windows.items() if torch.equal(window.flip(2), result)]
        assert len(found) == 1
        kinds |= set(found)
    assert len(kinds) > 20 and {mirror for mirror, _, _ in kinds} == {False, True}
    assert {down for _, down, _ in kinds} == {right for _, _, right in kinds} == set(range(5))


def test_an_equiangular_head_is_a_simplex() -> None:
    vectors = equiangular(50, 128)
    assert torch.allclose(vectors @ vectors.T, torch.eye(50) * (1 + 1 / 49) - 1 / 49, atol=1e-5)


def test_one_head_puts_the_classes_of_its_task_first() -> None:
    model = OneHeadViT().eval()
    images = torch.randn(3, 3, 32, 32)
    whole = model(images, 0)
    cosines = functional.normalize(model.features(images), dim=1) @ functional.normalize(model.head.weight, dim=1).T
    assert torch.allclose(whole, 16 * cosines, atol=1e-4) and whole.shape == (3, 50)
    assert torch.equal(model(images, 2)[:, :10], whole[:, 20:30])


def test_a_fixed_head_never_moves() -> None:
    torch.manual_seed(0)
    model, protocol = OneHeadViT(), PROTOCOLS["short-one-head"]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = METHODS["defaults-fixed-head"].optimizer(model, protocol)
    functional.cross_entropy(model(torch.randn(4, 3, 32, 32), 1), torch.arange(4)).backward()
    optimizer.step()
    still = [name for (name, now), old in zip(model.named_parameters(), before) if torch.equal(now, old)]
    assert still == ["head.weight"]
