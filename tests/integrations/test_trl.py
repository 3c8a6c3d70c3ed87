"""TRL's SFTTrainer keeps a pool of texts and learns its own: plain, packed, with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import relative_drift

from nullspace_optim import NumericalRank, unwrap

pytest.importorskip("trl", minversion="0.20")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from nullspace_optim.integrations.transformers import NullSpaceCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=32, task_type="CAUSAL_LM")
CHAT = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def tokenizer() -> Any:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *(f"w{k}" for k in range(60))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT)


def texts(task: int) -> list[str]:
    """Four texts of 4 to 7 words, those of another task of other words."""
    generator = torch.Generator().manual_seed(task)
    words = torch.randint(30 * task, 30 * task + 30, (4, 7), generator=generator).tolist()
    return [" ".join(f"w{k}" for k in row[: 4 + number]) for number, row in enumerate(words)]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=62, n_positions=16, n_embd=48, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model.eval()(**tokenizer()(text, return_tensors="pt")).logits[0] for text in texts(0)])


def sft(folder: Path, callback: Any, adapter: Any = None, rate: float = 3e-3, **options: Any) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    made = SFTConfig(
        str(folder), per_device_train_batch_size=2, learning_rate=rate, num_train_epochs=10, max_length=8, seed=0,
        logging_strategy="epoch", **quiet, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": texts(1)})
    return SFTTrainer(
        gpt2(), made, train_dataset=data, processing_class=tokenizer(), callbacks=[callback], peft_config=adapter
    )


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True},
    "packed and cut": {"packing": True, "packing_strategy": "wrapped"},
    "LoRA": {"adapter": LORA, "rate": 3e-2},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_pool_of_texts_is_kept_and_other_texts_are_learned(run: str, tmp_path: Path) -> None:
    callback = NullSpaceCallback(texts(0), policy=NumericalRank(), progress=False)
    running = sft(tmp_path, callback, **RUNS[run])
    old = logits(running.model)
    running.train()
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    assert relative_drift(logits(running.model), old) < 1e-5 and unwrap(running.optimizer).verify().ok
    assert losses[-1] < losses[0] - 0.1
    assert all("nullspace/free" not in entry for entry in running.state.log_history if "entropy" in entry)
    assert [report.task for report in callback.reports] == ["pool", "task 2"]


def test_padding_of_a_pool_of_texts_takes_no_directions(tmp_path: Path) -> None:
    """Texts in one batch, padded to the longest, take the directions of the same texts one by one."""
    ranks = []
    for size in (1, 4):
        callback = NullSpaceCallback(texts(0), False, policy=NumericalRank(), progress=False)
        running = sft(tmp_path, callback, max_steps=1, per_device_eval_batch_size=size)
        running.train()
        found = unwrap(running.optimizer).bases
        ranks.append({name: basis.rank for name, basis in found.items()})
        assert found["transformer.wte.weight"].subspaces["rows"].basis.min() > 0  # the first row is that of padding
    assert ranks[0] == ranks[1]


def test_chats_are_a_pool_and_a_tokenizer_need_not_pad(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts(0)]
    callback = NullSpaceCallback(datasets.Dataset.from_list(chats), False, policy=NumericalRank(), progress=False)
    running = sft(tmp_path, callback)
    running.processing_class.pad_token = None
    old = logits(running.model)
    running.train()
    assert relative_drift(logits(running.model), old) < 1e-5
    assert running.processing_class.pad_token is None
