"""Faults of the data and the model given to `consolidate`, and of bases and numbers, that no other file tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training import mlp, relative_drift, train, wrap

from nullspace_optim import ConsolidationError, Energy, Fate, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import CaptureError

ROWS = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


def spectra(loader: Any, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Return the spectra that a fresh consolidation of `loader` finds."""
    twin = copy.deepcopy(model)
    optimizer = wrap(twin, policy=Energy(0.9))
    optimizer.consolidate(loader, progress=False, **options)
    return {name: basis.spectrum for name, basis in optimizer.bases.items() if basis.spectrum is not None}


def same(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return one.keys() == two.keys() and all(
        float((one[name] - two[name]).norm() / one[name].norm()) <= tolerance for name in one
    )


# ---- data ----


@pytest.mark.fault(47)
@pytest.mark.parametrize("rows", ["relevant", "all"])
def test_a_dead_layer_has_rank_zero_and_stays_trainable(rows: str) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    nn.init.constant_(model[0].bias, -1e6)
    optimizer = wrap(model, rows=rows, policy=Energy(0.99))
    report = optimizer.consolidate([ROWS], progress=False)
    line = next(row for row in report.parameters if row.name == "2.weight")
    assert (line.rank, line.fate, line.energy) == (0, Fate.PROTECTED, 1.0)
    assert optimizer.verify().worst == 0.0
    before = model(ROWS).detach()
    train(optimizer, model, inputs=ROWS)
    assert relative_drift(model(ROWS), before) <= 1e-6


@pytest.mark.fault(48)
def test_few_rows_bound_the_rank_and_are_noted() -> None:
    model = mlp()
    optimizer = wrap(model)
    report = optimizer.consolidate([ROWS[:3].repeat(5, 1)], progress=False)
    assert {row.rank for row in report.of(Fate.PROTECTED)} == {3}
    assert "2 parameters met fewer than 10 rows for each kept direction ('0.weight': 15 rows, rank 3, ...)" in str(
        report
    )
    assert "fewer than 10 rows" not in str(optimizer.consolidate([ROWS[:3].repeat(10, 1)], progress=False))
    constant = mlp()
    assert wrap(constant).consolidate([torch.ones(30, 24)], progress=False).parameters[0].rank == 1


@pytest.mark.fault(49)
def test_half_precision_rows_whose_squares_overflow_are_summed_in_float32() -> None:
    model = mlp().half()
    rows = (1000 * ROWS).half()
    assert not rows.square().isfinite().all()
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), model, policy=Energy(0.99))
    optimizer.consolidate([rows], progress=False)
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double()).flip(0)
    assert relative_drift(optimizer.bases["0.weight"].spectrum[0], exact.float()) <= 1e-5


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without end or length."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from ROWS


@pytest.mark.fault(50)
def test_an_endless_data_set_works_with_a_limit() -> None:
    model = mlp()
    assert same(spectra(DataLoader(Stream(), 8), model, max_batches=5), spectra([ROWS], model))


@pytest.mark.fault(53)
def test_batches_of_no_samples_add_nothing_and_small_ones_count_by_rows() -> None:
    model = mlp()
    parts = [ROWS[:0], ROWS[:32], ROWS[:0], ROWS[32:39], ROWS[39:]]
    assert same(spectra(parts, model), spectra([ROWS], model))
    optimizer = wrap(model)
    assert optimizer.consolidate(parts, progress=False).batches == 3
    assert optimizer.verify(parts).missing == ()
    with pytest.raises(ConsolidationError, match="gave no batches"):
        optimizer.consolidate([ROWS[:0]], progress=False)


@pytest.mark.fault(54)
def test_padding_that_the_model_masks_does_not_count() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0)

        def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
            hidden = self.block(rows, src_key_padding_mask=~mask)
            pooled: Tensor = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return pooled

    model, rows = Reader(), ROWS.reshape(4, 10, 24)
    mask = torch.arange(10)[None] < torch.tensor([[3], [10], [5], [7]])
    padded = torch.where(mask[:, :, None], rows, 100.0)
    one_by_one = [{"rows": r[None, m], "mask": m[None, m]} for r, m in zip(rows, mask)]
    assert same(spectra([{"rows": padded, "mask": mask}], model), spectra(one_by_one, model), 1e-4)


@pytest.mark.fault(55)
def test_integer_images_keep_their_type() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 4)

        def forward(self, images: Tensor) -> Tensor:
            assert images.dtype == torch.uint8
            result: Tensor = self.layer(images.float() / 255)
            return result

    model = Net()
    report = wrap(model).consolidate([torch.randint(0, 256, (5, 24), dtype=torch.uint8)], progress=False)
    assert report.parameters[0].rank == 5


@pytest.mark.fault(55)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_moved_to_the_parameters_device() -> None:
    model = mlp().cuda()
    report = wrap(model).consolidate(DataLoader(TensorDataset(ROWS), 8, pin_memory=True), progress=False)
    assert report.fates[Fate.PROTECTED] == 2


class Broken(Dataset):  # type: ignore[type-arg]
    """A sample that raises, or that kills its worker process."""

    def __init__(self, deadly: bool = False) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            if self.deadly:
                os._exit(1)
            raise LookupError("sample 9 is broken")
        return ROWS[index]


@pytest.mark.fault(56)
def test_an_error_in_a_worker_process_passes_and_changes_nothing() -> None:
    fails_and_changes_nothing(Broken(), LookupError, "sample 9 is broken")


def fails_and_changes_nothing(data: Dataset, kind: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([ROWS[:4]], progress=False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(kind, match=message):
        optimizer.consolidate(DataLoader(data, 4, num_workers=1, persistent_workers=True), progress=False)
    assert len(optimizer._core.store.tasks) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.nightly
@pytest.mark.fault(56)
def test_a_worker_process_that_dies_changes_nothing() -> None:
    """In a process of its own: torch raises again in every later signal of a child while the loader lives."""
    script = "from test_data_and_model import *; fails_and_changes_nothing(Broken(True), RuntimeError, 'worker')"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


@pytest.mark.fault(57)
def test_the_order_of_the_data_changes_nothing_and_augmentation_is_told() -> None:
    model = mlp()
    data = TensorDataset(ROWS)
    assert same(spectra(DataLoader(data, 8, shuffle=True), model), spectra(DataLoader(data, 16), model))
    optimizer = wrap(model)
    optimizer.consolidate(DataLoader(data, 8, shuffle=True), progress=False)
    assert optimizer.verify(DataLoader(data, 8, shuffle=True)).missing == ()
    augmented = optimizer.verify(DataLoader(TensorDataset(ROWS + 0.1 * torch.randn_like(ROWS)), 8))
    assert "not compared" in str(augmented) and augmented.missing == ("task 1",)


@pytest.mark.fault(60)
@pytest.mark.parametrize("kind", ["GPU", "CPU", "Python"])
def test_out_of_memory_names_the_parameter_the_bytes_and_the_way_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception = {
        "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "Python": MemoryError(),
    }[kind]
    real = torch.zeros

    def zeros(*shape: Any, **options: Any) -> Tensor:
        if shape[1:] == (24, 24):
            raise error
        result: Tensor = real(*shape, **options)
        return result

    model = mlp()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(CaptureError, match=r"'0\.weight': no memory on cpu .*\[1, 24, 24\], 4608 bytes.*model\.cpu"):
        optimizer.consolidate([ROWS], progress=False)
    monkeypatch.undo()
    assert not optimizer.bases
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.fault(60)
def test_an_eigenvalue_solver_without_memory_is_an_error_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()

    def eigh(matrix: torch.Tensor) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4608 bytes.")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(ConsolidationError, match=r"'0\.weight'.*not enough memory"):
        wrap(model).consolidate([ROWS], progress=False)


# ---- model ----


@pytest.mark.fault(65)
def test_a_compiled_model_is_not_compiled_again_because_of_a_consolidation() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = mlp()
    compiled = torch.compile(model, backend=counter)
    optimizer = NullSpaceOptimizer(SGD(model.parameters(), lr=0.1), compiled, policy=NumericalRank())
    optimizer.consolidate([ROWS[:4]], progress=False)
    train(optimizer, compiled, 3, ROWS)
    frames = counter.frame_count
    assert frames
    optimizer.consolidate([ROWS[4:8]], progress=False)
    assert counter.frame_count == frames, "measured eagerly"
    train(optimizer, compiled, 3, ROWS)
    assert counter.frame_count == frames
    torch._dynamo.reset()


@pytest.mark.fault(69)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_layers_are_captured(how: str) -> None:
    layer = nn.Linear(24, 16)
    scripted = torch.jit.script(layer) if how == "script" else torch.jit.trace(layer, ROWS)
    model = nn.Sequential(scripted, nn.Tanh(), nn.Linear(16, 8))
    optimizer = wrap(model)
    optimizer.consolidate([ROWS[:4]], progress=False)
    assert optimizer.bases["0.weight"].rank == 4
    before = model(ROWS[:4]).detach()
    train(optimizer, model, inputs=ROWS)
    assert relative_drift(model(ROWS[:4]), before) <= 1e-5


@pytest.mark.fault(70)
def test_layers_called_by_keyword_and_with_several_inputs_are_captured() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.two = nn.Linear(24, 12), nn.Bilinear(12, 24, 8)
            self.attend = nn.MultiheadAttention(24, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(query=x, key=x, value=x)[0]
            result: Tensor = self.two(self.plain(input=x), x)
            return result

    model = Net()
    report = wrap(model).consolidate([ROWS.reshape(4, 10, 24)], progress=False)
    fates = {row.name: (row.fate, row.reason) for row in report.parameters}
    assert fates["plain.weight"][0] is fates["attend.in_proj_weight"][0] is Fate.FULL
    assert fates["two.weight"] == (Fate.FROZEN, "read by aten._trilinear")


@pytest.mark.fault(71)
def test_a_layer_that_a_task_does_not_reach_keeps_its_basis() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(24, 8), nn.Linear(24, 8)

        def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
            result: Tensor = self.image(image) if text is None else self.image(image) @ self.text(text).T
            return result

    model = Towers()
    optimizer = wrap(model)
    report = optimizer.consolidate([{"image": ROWS[:3]}], progress=False)
    assert {row.name for row in report.of(Fate.FREE)} == {"text.weight", "text.bias"}
    optimizer.consolidate([{"image": ROWS[3:6], "text": ROWS[:4]}], progress=False)
    optimizer.consolidate([{"image": ROWS[6:9]}], progress=False)
    assert [optimizer.bases[f"{tower}.weight"].rank for tower in ("image", "text")] == [9, 4]
    assert optimizer.bases["text.weight"].tasks == ("task 2",)


@pytest.mark.fault(72)
def test_hooks_of_the_user_run_in_order_and_may_remove_themselves() -> None:
    model, calls = mlp(), []
    first = model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))

    def once(*_: Any) -> None:
        calls.append("once")
        handle.remove()

    handle = model[0].register_forward_hook(once)
    model[0].register_forward_hook(lambda *_: calls.append("post"))
    wrap(model).consolidate([ROWS], progress=False)
    assert calls[:3] == ["pre", "once", "post"]
    assert calls.count("once") == 1
    assert len(model[0]._forward_hooks) == 1 and list(model[0]._forward_pre_hooks) == [first.id]


@pytest.mark.fault(73)
def test_side_effects_of_a_forward_can_be_avoided_with_forward() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bank = nn.Linear(24, 8), []

        def forward(self, x: Tensor, remember: bool = True) -> Tensor:
            if remember:
                self.bank.append(x)
            result: Tensor = self.layer(x)
            return result

    model = Bank()
    wrap(model).consolidate([ROWS], progress=False)
    assert model.bank, "what a forward does to Python objects cannot be undone"
    quiet = Bank()
    report = wrap(quiet).consolidate([ROWS], forward=lambda x: quiet(x, remember=False), progress=False)
    assert not quiet.bank and report.parameters[0].fate is Fate.FULL
    assert "side effects" in (NullSpaceOptimizer.consolidate.__doc__ or "")


@pytest.mark.fault(75)
def test_inference_tensors_do_not_leak_into_training() -> None:
    model = mlp()
    optimizer = wrap(model)
    with torch.inference_mode():
        rows = ROWS[:4] * 2
        optimizer.consolidate([rows], progress=False)
    assert rows.is_inference()
    kept = [t for b in optimizer.bases.values() for s in b.subspaces.values() for t in (s.basis, s.anchor, s.spectrum)]
    assert not any(t.is_inference() for t in kept)
    before = model(ROWS[:4] * 2).detach()
    train(optimizer, model, inputs=ROWS)
    assert relative_drift(model(ROWS[:4] * 2), before) <= 1e-5


# ---- numbers ----


@pytest.mark.fault(84)
def test_deterministic_algorithms_are_enough_and_give_the_same_bits_twice() -> None:
    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 24), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = wrap(model)
        optimizer.consolidate([torch.arange(6)], progress=False)
        train(optimizer, model, 5, torch.arange(12))
        optimizer.consolidate([torch.arange(6, 9)], progress=False)
        return model.state_dict()

    torch.use_deterministic_algorithms(True)
    try:
        one, two = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one[name], two[name]) for name in one)
