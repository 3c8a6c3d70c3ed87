"""Loaders of a pool (what a model must keep) made as a Hugging Face trainer makes its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import BatchError
from ..model.batches import Forward, feeder


class TrainerLoader:
    """Batches of a data set, collated by `trainer` without shuffling, a share of them for each process.

    Samples are what the trainer's own data set holds, or texts: strings, or mappings with a ``"text"`` or a list of
    chat ``"messages"``, which the trainer's tokenizer reads. `forward` reads batches of texts: what a language model
    says at padding is left out.

    Raises:
        BatchError: the trainer cannot make batches of the samples.
    """

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.dataset = dataset
        self.forward: Forward | None = None
        self._trainer = trainer
        with _Understood(self):
            sample = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
            tokenizer = trainer.processing_class
            if _text(sample, tokenizer) is None:
                self._loader = trainer.get_test_dataloader(dataset)
            else:
                if not callable(tokenizer):
                    raise BatchError(
                        f"this {type(trainer).__name__} has no tokenizer for the texts to consolidate: "
                        "give it one, processing_class=tokenizer, or give samples of tokens"
                    )
                collate = partial(_tokenized, tokenizer=_padding(tokenizer), length=_longest(trainer))
                loader: Any = DataLoader(dataset, batch_size=trainer.args.eval_batch_size, collate_fn=collate)
                self._loader = trainer.accelerator.prepare(loader)
                self.forward = _real_tokens(trainer.model)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        with _Understood(self):
            batches = iter(self._loader)
        while True:
            with _Understood(self):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class _Understood:
    """Context in which a failure to make a batch is told in one sentence."""

    def __init__(self, loader: TrainerLoader) -> None:
        self._trainer = loader._trainer
        self._dataset = loader.dataset

    def __enter__(self) -> None:
        """Begin to make a batch."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, BatchError):
            return
        trainer = self._trainer
        raise BatchError(
            f"the collator of this {type(trainer).__name__} ({_name(trainer.data_collator)}) made no batch of the "
            f"{type(self._dataset).__name__} to consolidate ({type(error).__name__}: {error}): give samples like those "
            "of its training data, texts, or a DataLoader of batches"
        ) from error


def batches_of(trainer: Any, data: Any) -> Iterable[Any]:
    """Return `data` if it is a loader, else its batches as `trainer` makes them.

    A data set has samples by index, or is an `IterableDataset`; everything else is taken for a loader, which is read as
    it is by every process.
    """
    streams = isinstance(data, IterableDataset) or type(data).__module__.startswith("datasets.")
    if streams or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return TrainerLoader(trainer, data)
    return data  # type: ignore[no-any-return]


def _text(sample: Any, tokenizer: Any) -> str | None:
    """Return the text of a sample, `None` if it holds none, or holds tokens already."""
    if isinstance(sample, str):
        return sample
    if not isinstance(sample, Mapping) or "input_ids" in sample:
        return None
    if isinstance(sample.get("text"), str):
        return str(sample["text"])
    if isinstance(sample.get("messages"), list):
        return str(tokenizer.apply_chat_template(sample["messages"], tokenize=False))
    return None


def _tokenized(samples: list[Any], tokenizer: Any, length: int | None) -> Any:
    texts = [_text(sample, tokenizer) for sample in samples]
    return tokenizer(texts, padding=True, truncation=length is not None, max_length=length, return_tensors="pt")


def _real_tokens(model: Any) -> Forward:
    """Return a forward that leaves out the outputs `[n, t, ...]` of a model at padding."""
    run = feeder(model)

    def read(batch: Any) -> Any:
        outputs = run(batch)
        logits, real = getattr(outputs, "logits", None), batch["attention_mask"].bool()
        if isinstance(logits, Tensor) and logits.ndim > 2 and logits.shape[:2] == real.shape:
            return logits[real.to(logits.device)]
        return outputs

    return read


def _padding(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad."""
    if getattr(tokenizer, "pad_token", "") is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _longest(trainer: Any) -> int | None:
    """Return the longest sequence that the trainer, its tokenizer and its model take, `None` if none of them tells."""
    config = getattr(trainer.model, "config", None)
    told = (
        getattr(trainer.args, "max_length", None),
        getattr(trainer.processing_class, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
    )
    return min((number for number in told if isinstance(number, int)), default=None)


def _name(collator: Any) -> str:
    return str(getattr(collator, "__name__", type(collator).__name__))
