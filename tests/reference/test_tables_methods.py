"""The published tables: GPM and TRGP as released keep what their own code keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from table_runs import Images, nscl_protocol, small
from torch import Tensor, nn
from torch.nn import functional

from nullspace_optim import NullSpaceOptimizer
from reference.published.data import (
    PermutedMNIST,
    SplitCIFAR100,
    _read_webp,
    read_mnist,
)
from reference.published.methods import METHODS, ByLayer
from reference.published.networks import PermutedMLP, SplitAlexNet
from reference.published.protocols import PROTOCOLS
from reference.published.runs import Run
from reference.published.sessions import (
    ReleasedConceptors,
    ReleasedTrustRegions,
    SharedConceptors,
    TrustRegions,
    named_weights,
)


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
    gradients = {
        name: weight.grad.clone() for name, weight in named_weights(run.model).items() if weight.grad is not None
    }
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
def test_trgp_as_released_trains_norms_and_relates_the_third_task_to_both(
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
    weights = [w.detach().clone().requires_grad_() for w in named_weights(run.model).values() if w.ndim == 2]
    rows = data[0].flatten(1)
    for number, (weight, span, mix) in enumerate(zip(weights, spans, mixing)):
        s, q = span[0], mix[0].detach()
        rows = (rows if number == 0 else rows.relu()) @ (weight + weight @ s @ (q - torch.eye(len(q))) @ s.T).T
    functional.cross_entropy(rows, data[1]).backward()
    for found, weight in zip((w for w in named_weights(run.model).values() if w.ndim == 2), weights):
        assert found.grad is not None and weight.grad is not None
        assert torch.allclose(found.grad, weight.grad, atol=1e-6)
    run.session.end()
    assert not run.session.hooks


def test_code_cl_as_released_mixes_at_random_and_leaves_small_layers_out(digits: Images, tmp_path: Path) -> None:
    run = Run(small(digits, tasks=1), METHODS["code-cl-released"], 1, digits, tmp_path)
    run.finish()
    assert isinstance(run.session, ReleasedConceptors)
    images, labels = run.tasks.part(0, "train")  # the same task once more: every layer is related
    run.session.begin(1, (images[:10], labels[:10]), (images[:60], labels[:60]))
    mixing = run.optimizer.param_groups[-1]["params"]
    assert {len(mix[0]) for mix in mixing} <= {80} and mixing
    for mix in mixing:
        assert not torch.equal(mix[0], torch.eye(80)) and float(mix.detach().abs().max()) <= 80**-0.5
        assert float(mix.detach().std()) == pytest.approx(80**-0.5 / 3**0.5, rel=0.05)  # uniform
    assert {mix.shape[-1] for mix in mixing} == {80}


def test_code_cl_as_released_scales_no_small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(9, 4, 3), nn.Linear(50, 2), nn.Linear(51, 2))
    found = {f"{n}.weight": {"shared": torch.zeros(1, size, 3)} for n, size in enumerate((75, 81, 50, 51))}
    monkeypatch.setattr(SharedConceptors, "directions", lambda *arguments: found)
    optimizer = NullSpaceOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    nothing = (torch.zeros(0), torch.zeros(0))
    assert set(ReleasedConceptors(optimizer, model).directions(1, nothing, nothing)) == {"1.weight", "3.weight"}
