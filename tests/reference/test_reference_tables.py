"""The published tables: data, networks, schedules, GPM's own rule, resuming, and what counts as reproduced."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.utils import shuffle
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import Energy, NullSpaceOptimizer, NullSpaceWarning, Spectrum
from reference.errors import ExperimentError
from reference.published import methods, runs
from reference.published.__main__ import main
from reference.published.data import MNIST_FILES, PermutedMNIST, SplitCIFAR100, _read_webp, read_cifar100, read_mnist
from reference.published.methods import METHODS, ByLayer, chosen_methods
from reference.published.networks import Dropout, PermutedMLP, PreActivationBlock, SplitAlexNet, SplitResNet18
from reference.published.protocols import PROTOCOLS, Protocol
from reference.published.published import Published, verdict
from reference.published.report import as_published, comparable, read_runs, report
from reference.published.runs import Run
from reference.published.sessions import KeptNorms, ReleasedTrustRegions, TrustRegions
from reference.published.training import Patience, augmented, train

Images = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture
def digits() -> Images:
    """Eighty pictures in the shape of MNIST: eight blobs of each class."""
    labels = torch.arange(10).repeat(8)
    pixels = torch.randint(0, 60, (80, 784), dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 78 * label : 78 * label + 40] += 150
    return {"train": (pixels, labels), "test": (pixels[:40], labels[:40])}


def small(images: Images, **settings: object) -> Protocol:
    return replace(
        PROTOCOLS["pmnist"], **{"read": lambda root: images, "tasks": 3, "epochs": 2, "samples": 30, **settings}
    )  # type: ignore[arg-type]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_drops_each_value_by_itself_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, shape = Dropout(p), (40, 8, 9, 7)
    x = torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    first, second = module(x), module(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    values = set(first.detach().float().unique().tolist())
    assert values == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    dropped = [(out == 0).float() for out in (first, second)]
    sd = (p * (1 - p)) ** 0.5
    for axis in range(4):  # no row, column, channel or image is dropped more often than chance allows
        share = dropped[0].mean(dim=[i for i in range(4) if i != axis])
        assert (share - p).abs().max() < 5 * sd / (first.numel() / shape[axis]) ** 0.5
    assert abs(dropped[0].mean() - p) < 4 * sd / first.numel() ** 0.5
    together = (dropped[0] * dropped[1]).mean()
    neighbours = (dropped[0].flatten()[1:] * dropped[0].flatten()[:-1]).mean()
    assert abs(together - p**2) < 0.01 and abs(neighbours - p**2) < 0.01
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first.detach())
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    assert torch.equal(module.eval()(x), x)


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


def test_rates_are_halved_after_shares_of_the_epochs(digits: Images) -> None:
    assert PROTOCOLS["cifar100-resnet"].halvings == {30, 60} and not PROTOCOLS["pmnist"].halvings
    protocol, rates = small(digits, epochs=4, milestones=(0.5, 0.75)), []
    tasks, model = PermutedMNIST(digits, seed=1), PermutedMLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)

    def penalty() -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    train(model, optimizer, tasks.part(0, "train"), tasks.part(0, "validation"), protocol, 0, 1, penalty)
    assert list(dict.fromkeys(rates)) == [0.08, 0.04, 0.02]
    assert rates.count(0.08) == len(rates) / 2


def test_the_rate_falls_along_a_cosine_anew_in_every_task(digits: Images) -> None:
    protocol = small(digits, epochs=2, cosine=True)
    tasks, model = PermutedMNIST(digits, seed=1), PermutedMLP()
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.08), model)
    for task in range(2):
        rates: list[float] = []

        def penalty(rates: list[float] = rates) -> float:
            rates.append(optimizer.param_groups[0]["lr"])
            return 0.0

        METHODS["gpm"].set_rates(optimizer, replace(protocol, rate=0.08), task)
        data = tasks.part(task, "train")
        train(model, optimizer, data, tasks.part(task, "validation"), protocol, task, 1, penalty)
        steps = 2 * math.ceil(len(data[1]) / protocol.batch)
        assert rates == pytest.approx([0.04 * (1 + math.cos(math.pi * n / steps)) for n in range(steps)])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_method_may_change_the_protocol_and_its_results_say_so(digits: Images, tmp_path: Path) -> None:
    own = replace(METHODS["gpm"], name="own", changes={"pmnist": {"batch": 20, "cosine": True}})
    results = Run(own.on(small(digits)), own, 1, digits, tmp_path).finish()
    assert results["settings"]["batch"] == 20 and results["settings"]["cosine"] is True
    assert not as_published(results)
    with pytest.raises(ExperimentError, match="made with batch=20, this run has"):
        Run(small(digits, cosine=True), own, 1, digits, tmp_path).finish()
    with pytest.raises(ExperimentError, match="own: has settings for pmnist only"):
        own.on(PROTOCOLS["cifar100"])


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


@pytest.fixture
def colours() -> Images:
    labels = torch.arange(30).repeat(8)
    pixels = torch.randint(0, 120, (240, 3, 32, 32), dtype=torch.uint8)
    pixels[torch.arange(240), labels % 3, labels % 10] += 120
    return {"train": (pixels, labels), "test": (pixels[:60], labels[:60])}


def nscl_protocol(images: Images, **settings: object) -> Protocol:
    changed = {"network": SmallResNet, "tasks": 3, "epochs": 2, "batch": 8, "samples": 40, **settings}
    return replace(PROTOCOLS["cifar100-resnet"], read=lambda root: images, **changed)  # type: ignore[arg-type]


def test_the_penalty_on_norms_is_ewcs_formula() -> None:
    torch.manual_seed(0)
    model = SmallResNet()
    session = KeptNorms(NullSpaceOptimizer(torch.optim.Adam(model.parameters()), model), model)
    assert session.penalty() == 0 and len(session.norms) == 6
    expected = torch.zeros((), dtype=torch.float64)
    terms = []
    for task in range(2):
        samples = torch.randn(70, 3, 8, 8)
        session.begin(task, (samples, samples), (samples, samples))
        session.end()
        model.eval()
        fisher = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in session.norms.items()}
        for batch in (samples[:32], samples[32:64], samples[64:]):
            model.zero_grad()
            logits = model(batch, task)
            functional.nll_loss(logits.log_softmax(1), logits.max(1).indices).backward()
            for name, parameter in session.norms.items():
                fisher[name] += len(batch) * parameter.grad.double() ** 2 / 3  # type: ignore[union-attr]
        terms.append((fisher, {name: p.detach().clone().double() for name, p in session.norms.items()}))
        with torch.no_grad():
            for parameter in session.norms.values():
                parameter += 0.1 * torch.randn_like(parameter)
    for fisher, centre in terms:
        for name, parameter in session.norms.items():
            expected += 100 * (fisher[name] * (parameter.detach().double() - centre[name]) ** 2).sum()
    assert float(expected) > 0 and float(torch.as_tensor(session.penalty()).detach()) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_adam_nscl_steps_as_published(colours: Images) -> None:
    """Three steps of the second task against Adam with L2 decay and `P / ||P||_F` behind it, in float64."""
    protocol, row = nscl_protocol(colours), METHODS["adam-nscl"]
    torch.manual_seed(1)
    model = SmallResNet()
    optimizer = row.optimizer(model, protocol)
    assert isinstance(optimizer, NullSpaceOptimizer)
    weight = model.blocks[0].conv2.weight
    with torch.no_grad():  # inputs of lower rank, so that some directions are free
        model.blocks[0].norm2.weight[:3], model.blocks[0].norm2.bias[:3] = 0, 0
    tasks = SplitCIFAR100(colours, seed=1)
    images, labels = tasks.part(0, "train")
    with pytest.warns(NullSpaceWarning, match="cannot be protected are trained"):
        optimizer.consolidate([images], forward=lambda x: model.eval()(x, 0), progress=False)
    row.set_rates(optimizer, protocol, 1)
    basis = optimizer.bases["blocks.0.conv2.weight"].U.double()
    projector = torch.eye(54, dtype=torch.float64) - basis @ basis.T
    assert 27 <= projector.trace().round() < 54
    group = next(g for g in optimizer.param_groups if g["params"][0] is weight)
    assert group["lr"] == pytest.approx(5e-5 / float(projector.norm()), rel=1e-6)
    expected, first, second = weight.detach().double().flatten(1), 0.0, 0.0
    norm_before = model.norm.weight.detach().clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        functional.cross_entropy(model(images, 1), labels).backward()
        gradient = weight.grad.double().flatten(1) + 5e-5 * weight.detach().double().flatten(1)  # type: ignore[union-attr]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected - 5e-5 * direction @ projector / projector.norm()
        optimizer.step()
    assert torch.allclose(weight.detach().double().flatten(1), expected, atol=2e-7)
    assert not torch.equal(model.norm.weight, norm_before)  # held by the penalty alone
    assert optimizer.verify().worst < 1e-5


def test_adam_nscl_goes_on_to_the_same_numbers(
    colours: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, row = nscl_protocol(colours), METHODS["adam-nscl"]
    whole = killed_and_taken_up(protocol, "adam-nscl", colours, tmp_path, monkeypatch, stops=(2,))
    half = Run(replace(protocol, precision="bfloat16"), row, 1, colours, tmp_path / "half").finish()
    assert half["settings"]["precision"] == "bfloat16" and half["losses"] != whole["losses"]
    assert half["losses"][0][0] == pytest.approx(whole["losses"][0][0], abs=0.05)
    with pytest.raises(ExperimentError, match="made with precision='bfloat16', this run has None"):
        Run(protocol, row, 1, colours, tmp_path / "half").finish()


@pytest.mark.parametrize(
    ("name", "precision", "products"),
    [
        ("adamw-update", "float32", "exact"),
        ("adamw-update", "bfloat16", "fast"),
        ("adamw-gradient", "bfloat16", "exact"),
        ("gpm", "bfloat16", "fast"),
    ],
)
def test_products_are_fast_where_weights_are_corrected_in_bfloat16(
    name: str, precision: Literal["float32", "bfloat16"], products: str
) -> None:
    optimizer = METHODS[name].optimizer(PermutedMLP(), replace(PROTOCOLS["pmnist"], precision=precision))
    assert isinstance(optimizer, NullSpaceOptimizer)
    assert f"precision='{products}'" in repr(optimizer)


@pytest.mark.parametrize("name", ["gpm", "sgp", "code-cl-plain"])
def test_runs_in_bfloat16_correct_weights_and_come_to_the_same(name: str, digits: Images) -> None:
    exact = small(digits)
    tasks, row = PermutedMNIST(digits, seed=1), METHODS[name]
    made = []
    for protocol in (exact, replace(exact, precision="bfloat16")):
        torch.manual_seed(1)
        model = PermutedMLP()
        optimizer = row.optimizer(model, protocol)
        assert isinstance(optimizer, NullSpaceOptimizer)
        for task in range(2):
            images, labels = (part[:200] for part in tasks.part(task, "train"))
            for first in range(0, 200, 10):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[first : first + 10]), labels[first : first + 10]).backward()
                optimizer.step()
            optimizer.consolidate([images[:30]], progress=False)
        made.append((row.project_in(protocol), optimizer.bases, model))
    (before, bases, one), (after, _, two) = made
    assert (before, after) == ("gradient", "update") and all(basis.rank for basis in bases.values())
    fresh = PermutedMLP()
    for w, other, start in zip(one.parameters(), two.parameters(), fresh.parameters()):
        assert torch.allclose(w, other, atol=1e-5) and not torch.allclose(w, start, atol=3e-3)


def test_patience_halves_the_rate_ends_and_restores_the_best_weights() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan = Patience(replace(PROTOCOLS["cifar100"], patience=2, least_rate=0.004), optimizer)
    rates, ended = [], []
    for loss in (1.0, 1.1, 1.2, 0.9, 1.1, 1.2):
        nn.init.constant_(model.weight, 10 * loss)
        ended.append(plan.exhausted(model, loss))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.005, 0.005]
    assert ended == [False] * 5 + [True]
    plan.restore(model)
    assert model.weight.item() == 9.0  # as they were when the loss was 0.9


def test_validation_images_come_in_a_new_order_in_each_epoch(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Tensor, Tensor]] = []

    def loss_on(model: nn.Module, data: tuple[Tensor, Tensor], batch: int, task: int) -> float:
        shown.append(data)
        return 1.0

    monkeypatch.setattr("reference.published.training.loss_on", loss_on)
    protocol = small(digits, epochs=3, patience=6)
    validation = (torch.arange(784 * 20.0).view(20, 784), torch.arange(20) % 10)
    for _ in range(2):
        model = PermutedMLP()
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), (torch.randn(20, 784), torch.arange(20) % 10),
              validation, protocol, task=1, seed=4)  # fmt: skip
    orders = [images[:, 0].div(784).long() for images, _ in shown]
    assert all(torch.equal(order.sort().values, torch.arange(20)) for order in orders)
    assert all(torch.equal(order % 10, labels) for order, (_, labels) in zip(orders, shown))
    assert all(torch.equal(first, again) for first, again in zip(orders[:3], orders[3:], strict=True))
    different = {tuple(order.tolist()) for order in orders}
    assert len(different) == 3 and tuple(range(20)) not in different
    assert protocol.settings()["shuffled"] and "shuffled" not in replace(protocol, patience=None).settings()


def gpm_as_released(matrices: list[np.ndarray], threshold: float, growth: float = 0.0) -> np.ndarray:
    """GPM's memory of one layer after tasks whose samples are `[d, n]`, by singular values as in its formulas."""
    memory = None
    for task, samples in enumerate(matrices):
        threshold += growth * (task > 0)
        energy = np.square(np.linalg.svd(samples, compute_uv=False)).sum()
        residual = samples if memory is None else samples - memory @ memory.T @ samples
        left, values, _ = np.linalg.svd(residual, full_matrices=False)
        shares = np.square(values) / energy
        if memory is None:
            memory = left[:, : int((np.cumsum(shares) < threshold).sum())]
            continue
        covered, count = 1 - np.square(values).sum() / energy, 0
        while covered < threshold:
            covered += shares[count]
            count += 1
        memory = np.hstack([memory, left[:, :count]])
    assert memory is not None
    return memory


def test_gpm_protects_what_its_formulas_protect(data_root: Path) -> None:
    protocol = PROTOCOLS["pmnist"]
    tasks = PermutedMNIST(read_mnist(data_root), seed=2)
    torch.manual_seed(0)
    model = PermutedMLP()
    optimizer = METHODS["gpm"].optimizer(model, protocol)
    assert isinstance(optimizer, NullSpaceOptimizer)
    inputs: list[list[np.ndarray]] = [[], [], []]
    for task in range(3):
        samples = tasks.part(task, "train")[0][:300]
        with torch.no_grad():
            first = model.lin1(samples).relu()
            second = model.lin2(first).relu()
        for layer, rows in zip(inputs, (samples, first, second)):
            layer.append(rows.double().numpy().T)
        optimizer.consolidate([samples], progress=False)
    for layer, (name, threshold) in zip(inputs, protocol.thresholds.items()):
        memory = gpm_as_released(layer, threshold)
        basis = optimizer.bases[f"{name}.weight"].U.double().numpy()
        assert basis.shape == memory.shape
        assert np.abs(basis @ basis.T - memory @ memory.T).max() < 2e-3, name


def test_gpm_protects_what_its_formulas_protect_in_convolutions(data_root: Path) -> None:
    protocol = PROTOCOLS["cifar100"]
    images = _read_webp(data_root / "cifar100" / "test.npz", 10_000)
    tasks = SplitCIFAR100({"train": images, "test": images}, seed=2)
    torch.manual_seed(0)
    model = SplitAlexNet().eval()
    model.layers.requires_grad_(False)
    optimizer = METHODS["gpm"].optimizer(model, protocol)
    assert isinstance(optimizer, NullSpaceOptimizer)
    layers = [block[0] for block in model.convolutions]  # type: ignore[index]
    inputs: list[list[np.ndarray]] = [[] for _ in layers]

    def patches(layer: nn.Conv2d, rows: list[np.ndarray], seen: Tensor) -> None:
        windows = np.lib.stride_tricks.sliding_window_view(seen.double().numpy(), layer.kernel_size, axis=(2, 3))
        rows.append(windows.transpose(1, 4, 5, 0, 2, 3).reshape(layer.weight[0].numel(), -1))

    for task in range(2):
        samples = tasks.part(task, "train")[0][:10]
        hooks = [
            layer.register_forward_pre_hook(lambda module, args, rows=rows: patches(module, rows, args[0]))
            for layer, rows in zip(layers, inputs)
        ]
        with torch.no_grad():
            model(samples, task)
        for hook in hooks:
            hook.remove()
        optimizer.consolidate([samples], forward=lambda x, task=task: model(x, task), progress=False)
    for i, rows in enumerate(inputs):
        memory = gpm_as_released(rows, protocol.thresholds[""], protocol.growth)
        basis = optimizer.bases[f"convolutions.{i}.0.weight"].U.double().numpy()
        assert basis.shape == memory.shape, i
        assert np.abs(basis @ basis.T - memory @ memory.T).max() < 5e-3, i


def test_gpm_under_sgd_projects_each_gradient_of_the_network(digits: Images) -> None:
    protocol = small(digits)
    tasks = PermutedMNIST(digits, seed=1)
    model = PermutedMLP()
    optimizer = METHODS["gpm"].optimizer(model, protocol)
    assert isinstance(optimizer, NullSpaceOptimizer)
    optimizer.consolidate([tasks.part(0, "train")[0]], progress=False)
    images, labels = tasks.part(1, "train")
    functional.cross_entropy(model(images), labels).backward()
    expected = {
        name: parameter.detach().double()
        - protocol.rate * parameter.grad.double() @ (torch.eye(parameter.shape[1]) - u @ u.T).double()
        for (name, parameter), u in zip(
            model.named_parameters(), (basis.U.double() for basis in optimizer.bases.values())
        )
        if parameter.grad is not None
    }
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], atol=1e-6), name


# runs


def _killed(model: nn.Module, optimizer: torch.optim.Optimizer, *_: object) -> list[float]:
    """Train a little, then die."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    raise KeyboardInterrupt


def killed_and_taken_up(
    protocol: Protocol, method: str, images: Images, folder: Path, monkeypatch: pytest.MonkeyPatch, stops: Sequence[int]
) -> dict[str, Any]:
    """The results of a run that is never killed, equal to those of one killed in the training of each of `stops`."""
    whole = Run(protocol, METHODS[method], 1, images, folder / "whole").finish()
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs, "train", lambda *a, stop=stop: train(*a) if a[5] < stop else _killed(*a))
            Run(protocol, METHODS[method], 1, images, folder / "parts").finish()
    resumed = Run(protocol, METHODS[method], 1, images, folder / "parts").finish()
    for key in ("accuracy", "losses", "ranks", "ACC", "BWT"):
        assert resumed[key] == whole[key], key
    return whole


@pytest.mark.parametrize("method", ["sgd", "gpm", "trgp", "trgp-released", "sgp", "code-cl", "adamw-both"])
def test_a_run_goes_on_after_each_task_to_the_same_numbers(
    method: str, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = killed_and_taken_up(small(digits), method, digits, tmp_path, monkeypatch, stops=(1, 2))
    assert [len(r) for r in whole["accuracy"]] == [1, 2, 3]
    assert whole["ACC"] == pytest.approx(np.mean(whole["accuracy"][-1]), abs=1e-3)
    assert whole["BWT"] == pytest.approx(
        np.mean([whole["accuracy"][-1][i] - whole["accuracy"][i][i] for i in range(2)]), abs=1e-3
    )
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"{method}-seed1.json"]


@pytest.mark.parametrize("method", ["trgp", "trgp-released", "code-cl"])
def test_a_run_with_a_head_for_each_task_goes_on_to_the_same_numbers(
    method: str, colours: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = nscl_protocol(colours, thresholds={"": 0.9}, augment=False, milestones=())
    killed_and_taken_up(protocol, method, colours, tmp_path, monkeypatch, stops=(2,))


def released_memory(
    rows: list[npt.NDArray[np.float64]], thresholds: list[float]
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]]]:
    """What TRGP's code keeps of one layer's inputs `[n, d]` of each task, and the subspaces of the tasks."""
    memory, spans = np.zeros((rows[0].shape[1], 0)), []
    for x, threshold in zip(rows, thresholds):
        total, old = (x**2).sum(), memory.shape[1]
        left, values, _ = np.linalg.svd((x - x @ memory @ memory.T).T, full_matrices=False)
        both, energies = np.hstack([memory, left]), np.hstack([((x @ memory) ** 2).sum(0), values**2])
        order, held = np.argsort(energies)[::-1], 0.0
        chosen = []
        for index in order:
            if held >= threshold * total:
                break
            held += energies[index]
            chosen.append(index)
        new = [index for index in chosen if index > old]
        if not old:
            new = chosen = list(range((np.cumsum(values**2) < threshold * total).sum()))
        spans.append(both[:, chosen])
        memory = np.hstack([memory, both[:, new]])
    return memory, spans


@pytest.mark.parametrize("growth", [0.0, -0.4])  # -0.4: the last task has stored directions alone in deeper layers
def test_trgp_as_released_keeps_what_its_code_keeps(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: float
) -> None:
    monkeypatch.setattr(ByLayer, "precise", True)  # moments in float64: close singular values are told apart
    run = Run(small(digits, growth=growth), METHODS["trgp-released"], 1, digits, tmp_path)
    assert isinstance(run.session, ReleasedTrustRegions) and isinstance(run.optimizer, NullSpaceOptimizer)
    names, inputs, scaled = ("lin1.weight", "lin2.weight", "fc1.weight"), [], []

    def recorded(self: Run, task: int, images: Tensor) -> None:
        plain = [w for name, w in self.model.named_parameters() if name.endswith(("weight", "original"))]
        layers = [images.flatten(1)]
        for weight in plain[:2]:
            layers.append((layers[-1] @ weight.detach().T).relu())
        inputs.append([layer.double().numpy() for layer in layers])
        with self.session.scoring(task):
            scaled.append(float((self.model(images, task).detach() - layers[-1] @ plain[2].detach().T).norm()))
        protect(self, task, images)

    protect = Run._protect
    monkeypatch.setattr(Run, "_protect", recorded)
    run.finish()
    assert scaled[0] < 1e-5 and min(scaled[1:]) > 1e-3
    assert run.optimizer.verify().ok
    ranks = run.state["ranks"]
    assert (ranks[1]["lin2.weight"] == ranks[2]["lin2.weight"]) == (growth < 0)
    for layer, name in enumerate(names):
        first = run.protocol.thresholds[name.removesuffix(".weight")]
        memory, spans = released_memory([task[layer] for task in inputs], [first + growth * t for t in range(3)])
        basis = run.optimizer.bases[name].subspaces["right"].basis[0].double().numpy()
        assert basis.shape == memory.shape
        assert np.allclose(basis @ basis.T, memory @ memory.T, atol=1e-5)
        found = [span[0].double().numpy() for span in run.session.spans[name].values()]
        assert [span.shape for span in found] == [span.shape for span in spans]
        for span, expected in zip(found, spans):
            assert np.allclose(span @ span.T, expected @ expected.T, atol=1e-5)


def test_trgp_as_released_finds_related_tasks_by_the_gradient_of_the_sample(digits: Images, tmp_path: Path) -> None:
    run = Run(small(digits), METHODS["trgp-released"], 1, digits, tmp_path)
    run.finish()
    assert isinstance(run.session, ReleasedTrustRegions)
    data = run.tasks.part(2, "train")
    run.session.gradients(2, data)
    gradients = {name: weight.grad.clone() for name, weight in run.session.weights().items() if weight.grad is not None}
    for number, candidates in ((2, ["task 2"]), (3, ["task 1", "task 2", "task 3"])):
        found = run.session.directions(number, (data[0][:1], data[1][:1]), data)
        for name, spans in run.session.spans.items():
            projected = {task: gradients[name] @ spans[task][0] @ spans[task][0].T for task in candidates}
            share = {task: float(part.norm() / gradients[name].norm()) for task, part in projected.items()}
            best = sorted((task for task in share if share[task] > 0.2), key=lambda task: share[task])[-2:]
            assert set(found.get(name, {})) == set(best)
            assert all(torch.equal(found[name][task], spans[task]) for task in best)
    assert found


@pytest.mark.filterwarnings("ignore::nullspace_optim.NullSpaceWarning")
def test_trgp_as_released_on_split_cifar100_trains_norms_and_relates_the_third_task_to_both(
    colours: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = nscl_protocol(colours, thresholds={"": 0.9}, augment=False, milestones=())
    norms: list[Tensor] = []

    def recorded(self: Run, task: int, images: Tensor) -> None:
        norms.append(torch.cat([p.detach().clone() for name, p in self.model.named_parameters() if "norm" in name]))
        protect(self, task, images)

    protect = Run._protect
    monkeypatch.setattr(Run, "_protect", recorded)
    Run(protocol, METHODS["trgp"], 1, colours, tmp_path).finish()
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[1], norms[2])
    run = Run(protocol, METHODS["trgp-released"], 1, colours, tmp_path)
    run.finish()
    assert not torch.equal(norms[3], norms[4]) and not torch.equal(norms[4], norms[5])
    assert isinstance(run.session, ReleasedTrustRegions) and run.session.threshold == 0.5
    run.session.threshold = 0.0
    for spans in run.session.spans.values():
        spans.pop("task 3", None)
    data = run.tasks.part(2, "train")
    found = run.session.directions(2, data, data)
    assert sum(set(origins) == {"task 1", "task 2"} for origins in found.values()) > 2


def test_trgp_as_released_finds_related_tasks_without_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = torch.randint(0, 255, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(10).repeat(6)
    images = {"train": (pixels, labels), "test": (pixels, labels)}
    protocol = replace(PROTOCOLS["cifar100"], read=lambda root: images, tasks=1, epochs=1, samples=6, patience=None)
    seen: list[Tensor] = []
    gradients = TrustRegions.gradients

    def recorded(self: TrustRegions, task: int, data: tuple[Tensor, Tensor]) -> None:
        gradients(self, task, data)
        seen.append(self.model.get_parameter("layers.0.0.weight").grad.clone())  # type: ignore[union-attr]

    monkeypatch.setattr(TrustRegions, "gradients", recorded)
    for method in ("trgp", "trgp-released"):
        run = Run(protocol, METHODS[method], 1, images, tmp_path)
        run.finish()
        assert isinstance(run.session, TrustRegions)
        data = run.tasks.part(0, "train")
        for _ in range(2):
            run.model.train()
            run.session.directions(0, data, data)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])


def test_trgp_as_released_trains_weights_through_their_scaling(digits: Images, tmp_path: Path) -> None:
    run = Run(small(digits, tasks=1), METHODS["trgp-released"], 1, digits, tmp_path)
    run.finish()
    assert isinstance(run.session, ReleasedTrustRegions)
    data = run.tasks.part(0, "train")
    run.session.begin(1, data, data)
    mixing = run.optimizer.param_groups[1]["params"]
    spans = [span for spans in run.session.related.values() for span in spans.values()]
    assert len(mixing) == len(spans) == 3
    with torch.no_grad():
        for mix in mixing:
            mix += torch.randn_like(mix) / 10
    run.session.gradients(1, data)
    weights = [w.detach().clone().requires_grad_() for w in run.session.weights().values() if w.ndim == 2]
    rows = data[0].flatten(1)
    for number, (weight, span, mix) in enumerate(zip(weights, spans, mixing)):
        s, q = span[0], mix[0].detach()
        rows = (rows if number == 0 else rows.relu()) @ (weight + weight @ s @ (q - torch.eye(len(q))) @ s.T).T
    functional.cross_entropy(rows, data[1]).backward()
    for found, weight in zip((w for w in run.session.weights().values() if w.ndim == 2), weights):
        assert found.grad is not None and weight.grad is not None
        assert torch.allclose(found.grad, weight.grad, atol=1e-6)
    run.session.end()
    assert not run.session.hooks


def test_a_run_of_other_settings_is_not_taken_up(digits: Images, tmp_path: Path) -> None:
    Run(small(digits, tasks=1), METHODS["sgd"], 1, digits, tmp_path).finish()
    with pytest.raises(ExperimentError, match=r"made with tasks=1, this run has 3.*--output"):
        Run(small(digits), METHODS["sgd"], 1, digits, tmp_path).finish()


def test_validation_runs_say_so_and_leave_the_test_images_alone(digits: Images, tmp_path: Path) -> None:
    del digits["test"]
    results = Run(small(digits), METHODS["sgd"], 1, digits, tmp_path, part="validation").finish()
    assert results["evaluated_on"] == "validation" and "held_out" not in results["settings"]
    more = Run(small(digits, held_out=0.5), METHODS["sgd"], 1, digits, tmp_path / "half", part="validation").finish()
    assert more["settings"]["held_out"] == 0.5 and more["losses"] != results["losses"] and not comparable(more)


def test_alexnet_runs_with_heads_dropout_and_patience(tmp_path: Path) -> None:
    pixels, labels = torch.randint(0, 255, (100, 3, 32, 32), dtype=torch.uint8), torch.arange(20).repeat(5)
    images = {"train": (pixels, labels), "test": (pixels, labels)}
    settings = {"read": lambda root: images, "tasks": 2, "epochs": 2, "samples": 6, "patience": 1}
    protocol = replace(PROTOCOLS["cifar100"], **settings)  # type: ignore[arg-type]
    run = Run(protocol, METHODS["gpm"], 1, images, tmp_path)
    results = run.finish()
    assert len(results["losses"]) == 2 and all(len(row) <= 2 for row in results["losses"])
    assert set(results["ranks"][0]) == {
        *(f"convolutions.{i}.0.weight" for i in range(3)),
        *(f"layers.{i}.0.weight" for i in range(2)),
        "heads.0.weight",
    }


# command line and report


def test_the_command_runs_what_is_missing_and_prints_the_table(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROTOCOLS, "pmnist", small(digits))
    words = ["pmnist", "--output", str(tmp_path), "--methods", "gpm,sgd", "--seeds", "1,2", "--tasks", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| GPM (`gpm`) | 1, 2 |" in printed and "93.91 ± 0.16 (-3), CUBER paper" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert main([*words, "--report"]) == 0 and main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} and len(before) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "gmp"], "unknown method 'gmp'; choose from sgd, gpm"),
        (["--seeds", "one"], "--seeds one: expected whole numbers"),
        (["--thresholds", "a,b,c"], "--thresholds a,b,c: expected numbers separated by commas, such as 0.95"),
        (["--thresholds", "0.9,0.9"], "--thresholds 0.9,0.9: pmnist has one each for: lin1, lin2, fc1"),
        (["--thresholds", "0.9,1.5,0.9"], "each is a share of energy"),
        (["--methods", "sgd-tuned", "--epochs", "0"], "epochs=0 must be at least 1"),
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--tasks", "11"], "ten tasks"),
        (["--held-out", "1"], "held_out=1.0 is a share of the training images, from 0.01 to 0.9"),
        (["--rate", "-1"], "rate=-1.0 of gpm must be positive"),
        (["--data-root", "nowhere"], "nowhere holds neither mnist"),
        (["--report"], "holds no finished run of pmnist"),
    ],
)
def test_mistakes_on_the_command_line_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pmnist", "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_file_among_the_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "gpm-seed1.json").write_text(json.dumps({"method": "gpm"}))
    with pytest.raises(ExperimentError, match=r"gpm-seed1\.json is not a results file"):
        read_runs(tmp_path, "pmnist")


def test_what_counts_as_reproduced() -> None:
    published = Published(93.91, 0.16, -3)
    assert verdict(93.70, 0.06, published) == "-0.21: reproduced"
    assert verdict(93.70, 0.04, published) == "-0.21: not reproduced"
    assert "one seed" in verdict(93.91, None, published)
    assert "no published deviation" in verdict(96.5, 0.1, Published(96.56))
    assert verdict(50.0, 0.1, None) == "no published figure"


def test_the_report_gives_mean_and_deviation_over_seeds() -> None:
    settings = {**PROTOCOLS["pmnist"].settings(), "base": "sgd"}
    common = {"table": "pmnist", "method": "gpm", "evaluated_on": "test", "settings": settings}
    finished = [
        {**common, "seed": seed, "ACC": value, "BWT": -3.0, "losses": [[0.2], [0.4]], "seconds": 10.0}
        for seed, value in ((2, 94.0), (1, 93.8))
    ]
    line = report(finished, "pmnist").splitlines()[-1]
    assert line.startswith("| GPM (`gpm`) | 1, 2 | 93.90 ± 0.14 | -3.00 ± 0.00 | 0.200 / 0.400 | 10 |")
    assert line.endswith("-0.01: reproduced |")
    short = [{**run, "settings": {**settings, "epochs": 1}} for run in finished]
    assert not as_published({**finished[0], "settings": {**settings, "precision": "bfloat16"}})
    assert report(short, "pmnist").endswith("| not the published settings |")
    low = report([{**run, "settings": {**settings, "precision": "bfloat16"}} for run in finished], "pmnist")
    assert "| GPM (`gpm`), in bfloat16 | 1, 2 |" in low and low.endswith("-0.01: reproduced |")
    with pytest.raises(ExperimentError, match="different settings"):
        report([finished[0], short[1]], "pmnist")


@pytest.mark.parametrize("table", ["pmnist", "cifar100"])
def test_committed_results_are_whole_and_consistent(table: str) -> None:
    folder = Path(__file__).parents[2] / "reference" / "results" / table
    for run in read_runs(folder, table):
        row = METHODS[run["method"]]
        settings = {**row.on(PROTOCOLS[table]).settings(), "rate": row.rate_in(row.on(PROTOCOLS[table]))}
        assert settings.items() <= run["settings"].items() and run["evaluated_on"] == "test", run["method"]
        assert comparable(run) != bool(row.changes.get(table, {}).keys() - {"rate"})
        matrix = run["accuracy"]
        assert [len(row) for row in matrix] == list(range(1, 11)) and len(run["losses"]) == 10
        assert run["ACC"] == pytest.approx(np.mean(matrix[-1]), abs=1e-3)
        assert run["BWT"] == pytest.approx(np.mean([matrix[-1][i] - matrix[i][i] for i in range(9)]), abs=1e-3)


def test_papers_own_rates_on_split_cifar100() -> None:
    for name, rate in (("sgp", 0.05), ("code-cl", 0.01), ("gpm", 0.01), ("trgp", 0.01)):
        method = METHODS[name]
        assert method.rate_in(method.on(PROTOCOLS["cifar100"])) == rate
        assert method.rate_in(method.on(PROTOCOLS["pmnist"])) == 0.01
    with pytest.raises(ExperimentError, match="--methods sgp: has settings for pmnist, cifar100 only"):
        METHODS["sgp"].on(PROTOCOLS["cifar100-resnet"])


def test_a_layers_longest_name_decides_and_thresholds_grow() -> None:
    protocol = replace(PROTOCOLS["pmnist"], thresholds={"": 0.9, "lin": 0.8, "lin1": 0.7}, growth=0.01)
    values = torch.full((100,), 1.0)
    for name, tasks, rank in (
        ("lin1.weight", 0, 70),
        ("lin2.weight", 0, 80),
        ("fc1.weight", 0, 90),
        ("fc1.weight", 2, 92),
    ):
        spectrum = Spectrum(values, 100.0, 1.0, 0.0, 0, 100, tasks=tasks, name=name)
        assert abs(methods.by_layer(Energy(), protocol).rank(spectrum) - rank) <= 1, name
    assert [method.name for method in chosen_methods("sgd,gpm,sgd")] == ["sgd", "gpm"]
