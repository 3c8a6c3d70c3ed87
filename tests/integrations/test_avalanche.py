"""Avalanche's own strategies: growing heads, a head a task, replay beside, a new optimizer for every experience."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from training import relative_drift
from two_tasks import example

from nullspace_optim import Fate, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import OptionError

pytest.importorskip(
    "avalanche", reason="Avalanche is not installed (it brings many packages): pip install avalanche-lib"
)
from avalanche.benchmarks import benchmark_from_datasets, tensors_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive

from nullspace_optim.integrations.avalanche import ConsolidatePlugin

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, HIDDEN, ROWS = 24, 32, 6


class Growing(nn.Module):
    """One head that grows with the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, HIDDEN)
        self.head = IncrementalClassifier(HIDDEN, initial_out_features=2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)))


class Heads(MultiTaskModule):
    """A head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, HIDDEN)
        self.head = MultiHeadClassifier(HIDDEN, initial_out_features=2)

    def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)), task_labels)


def rows(task: int) -> tuple[Tensor, Tensor]:
    """Inputs `[6, 24]` of a task and labels of its two classes."""
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(task))
    return inputs, torch.tensor([0, 1, 0, 1, 0, 1]) + 2 * task


def benchmark(labelled: bool) -> Any:
    tensors = [rows(task) for task in range(3)]
    labels = [0, 1, 2] if labelled else [0, 0, 0]
    return tensors_benchmark(train_tensors=tensors, test_tensors=tensors, task_labels=labels)


def wrap(model: nn.Module) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=3e-3), model, policy=NumericalRank())


class Anew(Naive):
    """A strategy that makes its optimizer for every experience."""

    def make_optimizer(self, **options: Any) -> None:
        self.optimizer = wrap(self.model)
        self.optimized_param_id = {}


def strategy(model: nn.Module, plugin: Any, kind: Any = Naive, *others: Any) -> Any:
    return kind(
        model=model, optimizer=wrap(model), criterion=nn.CrossEntropyLoss(), train_mb_size=4, train_epochs=8,
        eval_mb_size=4, plugins=[plugin, *others],
    )  # fmt: skip


@torch.no_grad()
def outputs(model: nn.Module, task: int) -> Tensor:
    """Logits of the classes that the task had, `[6, 2 (task + 1)]` of one head, `[6, 2]` of its own head."""
    model.eval()
    if isinstance(model, Heads):
        return model(rows(task)[0], torch.full((ROWS,), task))[:, 2 * task : 2 * task + 2]
    return model(rows(task)[0])[:, : 2 * task + 2]


@pytest.mark.parametrize("kind", [Naive, Anew], ids=["one optimizer", "an optimizer an experience"])
@pytest.mark.parametrize("build", [Growing, Heads], ids=["growing head", "head a task"])
def test_old_outputs_stay_over_three_experiences(build: Any, kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plugin = build(), ConsolidatePlugin(progress=False, path=tmp_path / "bases.safetensors")
    trained, then = strategy(model, plugin, kind), []
    for task, experience in enumerate(benchmark(build is Heads).train_stream):
        before = model.body.weight.detach().clone()
        trained.train(experience)
        assert relative_drift(model.body.weight, before) > 1e-4
        then.append(outputs(model, task))
        assert trained.optimizer.verify().ok
        for old, logits in enumerate(then):
            assert relative_drift(outputs(model, old), logits) < 1e-5
    assert [report.task for report in plugin.reports] == ["task 1", "task 2", "task 3"]
    heads = [n for n, basis in trained.optimizer.bases.items() if "head" in n and basis.fate is Fate.PROTECTED]
    assert len(heads) == (3 if build is Heads else 1)
    trained.eval(benchmark(build is Heads).test_stream)
    assert trained.optimizer.verify().ok and (tmp_path / "bases.safetensors").exists()


def test_without_the_plugin_nothing_is_held() -> None:
    torch.manual_seed(0)
    model = Growing()
    trained, stream = strategy(model, ReplayPlugin(mem_size=2)), benchmark(False).train_stream
    trained.train(stream[0])
    then = outputs(model, 0)
    trained.train(stream[1])
    assert relative_drift(outputs(model, 0), then) > 1e-2


def test_what_replay_mixes_in_is_not_consolidated_again() -> None:
    torch.manual_seed(0)
    plugin = ConsolidatePlugin(progress=False)
    trained = strategy(Growing(), plugin, Naive, ReplayPlugin(mem_size=4))
    for experience in benchmark(False).train_stream:
        trained.train(experience)
    assert [report.samples for report in plugin.reports] == [ROWS] * 3


def test_a_forward_of_your_own_gets_the_batch() -> None:
    torch.manual_seed(0)
    model, seen = Growing(), []
    plugin = ConsolidatePlugin(progress=False, forward=lambda batch: (seen.append(len(batch)), model(batch[0]))[1])
    strategy(model, plugin).train(benchmark(False).train_stream[0])
    assert seen and set(seen) == {3}


def test_training_transforms_are_not_consolidated() -> None:
    torch.manual_seed(0)
    model, seen = nn.Linear(WIDTH, 2), []
    plugin = ConsolidatePlugin(progress=False, forward=lambda batch: (seen.append(batch[0]), model(batch[0]))[1])
    groups = {"train": (lambda row: row + 100, None), "eval": (None, None)}
    inputs, labels = rows(0)
    data = TensorDataset(inputs, labels)
    data.targets = labels
    dataset = as_classification_dataset(data, transform_groups=groups)
    strategy(model, plugin).train(benchmark_from_datasets(train=[dataset]).train_stream[0])
    assert torch.equal(torch.cat(seen)[:ROWS], inputs)


def test_a_bare_optimizer_is_refused_before_training() -> None:
    trained = strategy(Growing(), ConsolidatePlugin(progress=False))
    trained.optimizer = AdamW(trained.model.parameters())
    with pytest.raises(OptionError, match="no NullSpaceOptimizer inside AdamW: wrap the base optimizer"):
        trained.train(benchmark(False).train_stream[0])


def test_a_missing_avalanche_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche.core", None)
    monkeypatch.delitem(sys.modules, "nullspace_optim.integrations.avalanche")
    with pytest.raises(ImportError, match="needs Avalanche: pip install"):
        importlib.import_module("nullspace_optim.integrations.avalanche")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("avalanche.md"), "avalanche.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()
