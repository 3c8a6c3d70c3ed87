"""`NullSpaceCallback` makes a Trainer keep a pool and learn its task, whatever options the trainer has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, IterableDataset
from training import relative_drift
from two_tasks import same_weights

from nullspace_optim import IGSP, NullSpaceOptimizer, NumericalRank, StaleAnchorError, unwrap
from nullspace_optim.errors import BatchError, OptionError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402
from trainers import Sentences, bert, call, keep, keeping_and_learning, logits, loss, names, trainer  # noqa: E402

from nullspace_optim.integrations.transformers import _refuse_deepspeed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers before transformers 5 leave their precision behind, bfloat16 of one test for the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)


class Weighted(transformers.Trainer):  # type: ignore[misc]
    """A trainer with its own collator and its own loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, data_collator=self.collate, **options)
        self.batches = 0

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        self.batches += 1
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels")}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        value = 2 * torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (value, outputs) if return_outputs else value


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True, "num_train_epochs": 10},
    "label smoothing, clipping, accumulation": {
        "label_smoothing_factor": 0.1,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 10,
    },
    "another optimizer": {"optim": "rmsprop", "optim_args": "alpha=0.9", "learning_rate": 3e-3},
    "a subclass": {"kind": Weighted},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pool_is_kept_and_the_task_is_learned(variant: str, tmp_path: Path) -> None:
    running = trainer(bert(), 1, tmp_path, keep(Sentences(0)), **VARIANTS[variant])
    limit = 2**-6 if variant == "bfloat16" else 1e-5  # the rounding of several bfloat16 products, one after the other
    with keeping_and_learning(running.model, running, limit):
        running.train()
    assert names(running) == ["pool", "task 2"]


def test_without_the_callback_the_pool_is_not_kept(tmp_path: Path) -> None:
    model = bert()
    old = logits(model).detach()
    trainer(model, 1, tmp_path, transformers.TrainerCallback()).train()
    assert relative_drift(logits(model).detach(), old) > 1e-2


def test_the_optimizer_is_the_one_that_the_trainer_would_have_made(tmp_path: Path) -> None:
    options = {
        "optim": "sgd",
        "weight_decay": 0.03,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "num_train_epochs": 8,
    }
    rates, wrapped = [], []
    for callback in (transformers.TrainerCallback(), call(None, False)):
        model = bert()
        running = trainer(model, 1, tmp_path, callback, logging_strategy="epoch", **options)
        running.train()
        rates.append([entry["learning_rate"] for entry in running.state.log_history if "loss" in entry])
        wrapped.append(model)
    base = unwrap(running.optimizer).detach()
    assert isinstance(base, SGD) and [group["weight_decay"] for group in base.param_groups] == [0.03, 0.0]
    assert rates[0] == rates[1] and len(set(rates[0])) > 5
    assert same_weights(*wrapped)  # nothing is protected


def test_a_checkpoint_resumes_bitwise_and_protected(tmp_path: Path) -> None:
    whole = trainer(bert(), 1, tmp_path, keep(Sentences(0)), save_strategy="steps", save_steps=5)
    with keeping_and_learning(whole.model, whole):
        whole.train()
    callback = keep(Sentences(0))
    again = trainer(bert(), 1, tmp_path, callback)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(whole.model, again.model)
    assert names(again) == ["pool", "task 2"] and [report.task for report in callback.reports] == ["task 2"]


def test_a_callback_that_comes_later_works_but_reads_no_checkpoint(tmp_path: Path) -> None:
    first = trainer(bert(), 1, tmp_path, transformers.TrainerCallback(), save_strategy="steps", save_steps=5)
    first.add_callback(keep(Sentences(0)))
    with keeping_and_learning(first.model, first):
        first.train()
    checkpoint = str(tmp_path / "checkpoint-5")
    late = trainer(bert(), 1, tmp_path, transformers.TrainerCallback())
    late.add_callback(keep(Sentences(0)))
    with pytest.raises(OptionError, match=r"bases in it were not read: pass the callback in callbacks="):
        late.train(resume_from_checkpoint=checkpoint)
    attached, callback = trainer(bert(), 1, tmp_path, transformers.TrainerCallback()), keep(Sentences(0))
    attached.add_callback(callback)
    callback.attach(attached)
    attached.train(resume_from_checkpoint=checkpoint)
    assert same_weights(first.model, attached.model) and names(attached) == ["pool", "task 2"]


def test_the_best_weights_are_consolidated(tmp_path: Path) -> None:
    """The best are those of the first epoch, not the last."""
    best = {**BEST, "metric_for_best_model": "loss", "greater_is_better": True, "num_train_epochs": 3}
    running = trainer(bert(), 1, tmp_path, keep(Sentences(0)), **best)
    with keeping_and_learning(running.model, running, better=0.001):
        running.train()
    assert running.state.best_model_checkpoint.endswith("checkpoint-2")
    known = transformers.AutoModelForSequenceClassification.from_pretrained(running.state.best_model_checkpoint)
    assert same_weights(running.model.cpu(), known)
    running.train_dataset = Sentences(2)
    learned = running.model.eval()(input_ids=Sentences(1).tokens).logits.detach()
    running.train()
    assert relative_drift(running.model.eval()(input_ids=Sentences(1).tokens).logits, learned) < 1e-5


def test_one_callback_serves_several_trainers(tmp_path: Path) -> None:
    model, callback = bert(), keep(Sentences(0), path=tmp_path / "bases.safetensors")
    old = logits(model).detach()
    for task in (1, 2):
        running = trainer(model, task, tmp_path, callback, num_train_epochs=2)
        running.train()
    assert names(running) == ["pool", "task 2", "task 3"]
    assert relative_drift(logits(model.eval()), old) < 1e-5 and unwrap(running.optimizer).verify().ok
    later = bert()
    later.load_state_dict(model.state_dict())
    again = trainer(later, 1, tmp_path, keep(Sentences(2), bases=tmp_path / "bases.safetensors"), num_train_epochs=2)
    again.train()
    assert names(again) == ["pool", "task 2", "task 3", "pool 2", "task 5"]
    assert relative_drift(logits(later.eval()), old) < 1e-5
    foreign = trainer(bert(), 1, tmp_path, keep(bases=tmp_path / "bases.safetensors"))
    with pytest.raises(StaleAnchorError):
        foreign.train()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([Sentences(0)[index] for index in range(4)])


POOLS: dict[str, Any] = {
    "a loader": DataLoader(Sentences(0), batch_size=3),
    "a list of samples": [Sentences(0)[index] for index in range(4)],
    "a stream": Stream(),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_may_be(pool: str, tmp_path: Path) -> None:
    running = trainer(bert(), 1, tmp_path, keep(POOLS[pool]), num_train_epochs=3)
    with keeping_and_learning(running.model, running, better=0.0):
        running.train()


def test_the_task_is_consolidated_on_what_is_given_or_not_at_all(tmp_path: Path) -> None:
    callback = keep(None, Sentences(2), name="two", max_batches=1)
    trainer(bert(), 1, tmp_path, callback, num_train_epochs=1).train()
    assert [(report.task, report.samples) for report in callback.reports] == [("two", 4)]
    none = keep(None, False)
    trainer(bert(), 1, tmp_path, none, num_train_epochs=1).train()
    assert none.reports == []


def test_an_optimizer_that_is_wrapped_already_is_used(tmp_path: Path) -> None:
    model = bert()
    given = NullSpaceOptimizer(AdamW(model.parameters(), lr=3e-3), policy=NumericalRank())
    running = trainer(model, 1, tmp_path, call(Sentences(0)), given={"optimizers": (given, None)})
    with keeping_and_learning(model, running):
        running.train()
    assert unwrap(running.optimizer) is given
    options = trainer(model, 1, tmp_path, keep(Sentences(0)), given={"optimizers": (given, None)})
    with pytest.raises(OptionError, match=r"NullSpaceCallback\(policy=\) has no effect on the NullSpaceOptimizer"):
        options.train()


def test_experts_beside_the_backbone_train_with_it(tmp_path: Path) -> None:
    model = bert()
    mode = IGSP("bert.encoder.layer.*.intermediate.dense", cap=10, window=5)
    given = NullSpaceOptimizer(AdamW(model.parameters(), lr=0.1), model, mode=mode)
    running = trainer(model, 1, tmp_path, call(), given={"optimizers": (given, None)}, num_train_epochs=20)
    before = loss(model.eval(), 1)
    running.train()
    with given.task("task 1"):
        assert loss(model.eval(), 1) < before
    pool = trainer(model, 1, tmp_path, call(Sentences(0)), given={"optimizers": (given, None)})
    with pytest.raises(OptionError, match=r"consolidate_before= .*mode"):
        pool.train()


class Replacing(transformers.TrainerCallback):  # type: ignore[misc]
    """What goes wrong where somebody puts an optimizer of their own into a running trainer."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= 1:
            self.trainer.optimizer = AdamW(kwargs["model"].parameters())


def test_an_optimizer_that_is_replaced_in_the_middle_is_refused(tmp_path: Path) -> None:
    running, other = trainer(bert(), 1, tmp_path, keep(Sentences(0))), Replacing()
    other.trainer = running
    running.add_callback(other)
    with pytest.raises(OptionError, match=r"replaced or unwrapped its optimizer since its training began"):
        running.train()


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there are two NullSpaceCallbacks in this trainer"):
        trainer(bert(), 1, tmp_path, keep(), kind=_twice)


def _twice(*args: Any, callbacks: Any, **options: Any) -> Any:
    return transformers.Trainer(*args, callbacks=[*callbacks, keep()], **options)


BAD_POOLS: dict[str, tuple[Any, str]] = {
    "samples of other lengths": ([{"input_ids": torch.ones(k, dtype=torch.long)} for k in (3, 4)], "Trainer .*made no"),
    "no samples": ([], "made no batch of the list"),
    "objects": ([object()] * 4, "made no batch of the list"),
    "texts without a tokenizer": (["some text"] * 4, "this Trainer has no tokenizer for the texts"),
}


@pytest.mark.parametrize("pool", BAD_POOLS)
def test_a_pool_that_makes_no_batches_is_told_in_one_sentence(pool: str, tmp_path: Path) -> None:
    samples, text = BAD_POOLS[pool]
    model = bert()
    with pytest.raises(BatchError, match=text):
        trainer(model, 1, tmp_path, keep(samples)).train()
    assert same_weights(model, bert())


def test_deepspeed_is_refused_before_training() -> None:
    def with_stage(stage: int) -> Any:
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        return SimpleNamespace(accelerator=SimpleNamespace(state=state))

    _refuse_deepspeed(with_stage(0))
    with pytest.raises(OptionError, match=r"DeepSpeed ZeRO stage 2 flattens matrices.*FSDP2"):
        _refuse_deepspeed(with_stage(2))


def test_what_cannot_be_protected_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OptionError("tensor parallelism is not supported")

    monkeypatch.setattr("nullspace_optim.optimizer.engine.refuse_tensor_parallel", refuse)
    running = trainer(bert(), 1, tmp_path, keep())
    with pytest.raises(OptionError, match="tensor parallelism"):
        running.train()
    assert running.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [({"mode": "igsp"}, "made by hand"), ({"polcy": 1}, "expected one of policy"), ({"policy": 3}, "policy=3")],
)
def test_wrong_options_are_named_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        call(Sentences(0), **options)


def test_a_callback_outside_a_trainer_says_where_it_belongs() -> None:
    with pytest.raises(OptionError, match=r"works in a transformers\.Trainer"):
        call().on_init_end(None, None, None)
