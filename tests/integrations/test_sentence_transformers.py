"""The trainer of sentence-transformers on a tiny BERT: two trainings are two tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from training import relative_drift
from two_tasks import example

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import BatchError
from nullspace_optim.integrations.hub import BASES_FILE, load_bases, save_pretrained

WHY = "sentence-transformers' trainer is not installed: pip install sentence-transformers datasets"
st = pytest.importorskip("sentence_transformers", reason=WHY)
datasets = pytest.importorskip("datasets", reason=WHY)
transformers = pytest.importorskip("transformers")
from nullspace_optim.integrations.transformers import NullSpaceCallback  # noqa: E402

losses = pytest.importorskip("sentence_transformers.losses")
pytestmark = pytest.mark.filterwarnings("ignore")


def sentences(task: int) -> list[str]:
    return [f"word{20 * task + n} word{20 * task + n + 1}" for n in range(6)]


def encoder(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"word{n}" for n in range(60))])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]").save_pretrained(folder)
    return st.SentenceTransformer(str(folder), device="cpu")


def trainer(model: Any, task: int, loss: Any, optimizer: Any, folder: Path, *callbacks: Any) -> Any:
    import pyarrow

    table = pyarrow.table({"anchor": sentences(task), "positive": [f"{text} word1" for text in sentences(task)]})
    arguments = st.SentenceTransformerTrainingArguments(
        str(folder), num_train_epochs=6, per_device_train_batch_size=3, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return st.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset(table, fingerprint=f"task{task}"),  # some versions cannot hash a table
        loss=loss,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def wrap(model: Any) -> NullSpaceOptimizer:
    return NullSpaceOptimizer(AdamW(model.parameters(), lr=3e-3), model, policy=NumericalRank())


def embeddings(model: Any) -> Tensor:
    return torch.as_tensor(model.encode(sentences(0)))


@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_two_trainings_are_two_tasks(kind: str, tmp_path: Path) -> None:
    drift = []
    for protected in (True, False):
        model = encoder(tmp_path / "tiny")
        optimizer, loss = wrap(model), getattr(losses, kind)(model)
        running: list[Any] = []

        def forward(batch: Any, model: Any = model, running: list[Any] = running) -> Any:
            return [model(column)["sentence_embedding"] for column in running[-1].collect_features(batch)[0]]

        call = NullSpaceCallback(progress=False, forward=forward)
        for task in range(2):
            running.append(trainer(model, task, loss, optimizer, tmp_path, *([call] if protected else [])))
            before = model[0].model.encoder.layer[0].output.dense.weight.detach().clone()
            then = embeddings(model)
            running[-1].train()
            assert relative_drift(model[0].model.encoder.layer[0].output.dense.weight, before) > 1e-4
        drift.append(relative_drift(embeddings(model), then))
    assert drift[0] < 1e-5 < 1e-2 < drift[1]


def test_a_batch_of_columns_asks_for_forward(tmp_path: Path) -> None:
    model = encoder(tmp_path / "tiny")
    optimizer = wrap(model)
    call = NullSpaceCallback(progress=False)
    with pytest.raises(BatchError, match=r"keys \['anchor_.*the model's forward needs \['input'\]; pass forward="):
        trainer(model, 0, losses.MultipleNegativesRankingLoss(model), optimizer, tmp_path, call).train()
    assert not optimizer.bases


def test_a_saved_encoder_goes_on_protected(tmp_path: Path) -> None:
    model = encoder(tmp_path / "tiny")
    optimizer = wrap(model)
    columns = model.preprocess(sentences(0)) if hasattr(model, "preprocess") else model.tokenize(sentences(0))
    optimizer.consolidate([columns], forward=model, progress=False)
    save_pretrained(model, optimizer, tmp_path / "saved")
    assert "What this model keeps" in (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert os.path.exists(tmp_path / "saved" / BASES_FILE)
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    loaded = wrap(again)
    load_bases(loaded, tmp_path / "saved")
    then = embeddings(again)
    trainer(again, 1, losses.MultipleNegativesRankingLoss(again), loaded, tmp_path).train()
    assert relative_drift(embeddings(again), then) < 1e-5 and loaded.verify().ok


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        datasets.Dataset.from_dict({"text": ["a"]})
    except Exception as error:
        pytest.skip(f"the installed datasets cannot make a Dataset: {error}")
    monkeypatch.chdir(tmp_path)
    exec(compile(example("sentence_transformers.md"), "sentence_transformers.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "bases.safetensors").is_file()
