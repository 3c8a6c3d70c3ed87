"""Model folders with bases: saved, read back, merged, and pushed to a Hub that runs on this machine."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_hub import local_hub
from torch import Tensor
from torch.optim import AdamW
from training import relative_drift
from two_tasks import build_net, example

from nullspace_optim import Energy, NullSpaceOptimizer, NumericalRank, TailEnergy
from nullspace_optim.errors import BasisFileError, OptionError, StaleAnchorError
from nullspace_optim.igsp import IGSP
from nullspace_optim.integrations.hub import BASES_FILE, load_bases, model_card, save_pretrained
from nullspace_optim.policies import SGP

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts(task: int) -> dict[str, Tensor]:
    tokens = torch.randint(20 * task, 20 * task + 20, (3, 4), generator=torch.Generator().manual_seed(task))
    return {"input_ids": tokens, "labels": tokens}


def labelled(task: int) -> dict[str, Tensor]:
    return {"input_ids": texts(task)["input_ids"], "labels": torch.tensor([0, 1, 0])}


def wrap(model: Any, **options: Any) -> NullSpaceOptimizer:
    base = AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    return NullSpaceOptimizer(base, model, **{"policy": NumericalRank(), **options})


def train(model: Any, optimizer: Any, batch: dict[str, Tensor], steps: int = 10) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def trained(model: Any, batch: dict[str, Tensor], **options: Any) -> NullSpaceOptimizer:
    optimizer = wrap(model, **options)
    train(model, optimizer, batch, 3)
    optimizer.consolidate([batch], name="first", progress=False)
    return optimizer


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=batch["input_ids"]).logits
    return result


def test_a_folder_that_was_saved_goes_on_protected(tmp_path: Path) -> None:
    model = bert()
    save_pretrained(model, trained(model, labelled(0)), tmp_path / "new" / "folder")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "new" / "folder")
    optimizer = wrap(again)
    load_bases(optimizer, str(tmp_path / "new" / "folder"))
    before = logits(again, labelled(0))
    assert torch.equal(before, logits(model, labelled(0)))
    train(again, optimizer, labelled(1))
    assert relative_drift(logits(again, labelled(0)), before) < 1e-5
    assert (
        relative_drift(again.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
        > 1e-3
    )


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_saved_fits_its_bases_at_once(precision: str, tmp_path: Path) -> None:
    model = bert()
    optimizer = trained(model, labelled(0), precision=precision)
    before = logits(model, labelled(0))
    train(model, optimizer, labelled(1), 5)
    save_pretrained(model, optimizer, tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    loaded = wrap(again)
    load_bases(loaded, tmp_path)
    assert relative_drift(logits(again, labelled(0)), before) < 1e-5 and loaded.verify().ok


def test_an_adapter_goes_on_protected(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], r=32, task_type="CAUSAL_LM")
    model = peft.get_peft_model(gpt(), config)
    save_pretrained(model, trained(model, texts(0)), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.startswith("---") and card.count("What this model keeps") == 1  # the card of PEFT keeps its text
    again = peft.PeftModel.from_pretrained(gpt(), tmp_path, is_trainable=True)
    optimizer = wrap(again)
    load_bases(optimizer, tmp_path)
    before = logits(again, texts(0))
    train(again, optimizer, texts(1))
    assert relative_drift(logits(again, texts(0)), before) < 1e-5 and optimizer.verify().ok
    save_pretrained(again, optimizer, tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8").count("What this model keeps") == 1


def drift_of_a_loaded_copy(model: Any, optimizer: NullSpaceOptimizer, folder: Path) -> float:
    """Return how far old outputs move when the model is saved, loaded elsewhere and trained on another task."""
    save_pretrained(model, optimizer, folder)
    again = transformers.GPT2LMHeadModel.from_pretrained(folder)
    before, loaded = logits(again, texts(0)), wrap(again)
    load_bases(loaded, folder)
    train(again, loaded, texts(1))
    return relative_drift(logits(again, texts(0)), before)


def test_a_merged_adapter_is_refused_with_old_bases_and_kept_with_new_ones(tmp_path: Path) -> None:
    model = peft.get_peft_model(gpt(), peft.LoraConfig(target_modules=["c_attn"], r=8, task_type="CAUSAL_LM"))
    adapters = trained(model, texts(0))
    merged = model.merge_and_unload()
    with pytest.raises(
        OptionError, match=r"protect 2 parameters that this GPT2LMHeadModel does not hold.*wrap the merged"
    ):
        save_pretrained(merged, adapters, tmp_path)
    assert not any(tmp_path.iterdir())
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    optimizer = wrap(merged)
    optimizer.consolidate([texts(0)], progress=False)
    assert drift_of_a_loaded_copy(merged, optimizer, tmp_path) < 1e-5


def test_an_adapter_merged_into_protected_weights_needs_new_anchors(tmp_path: Path) -> None:
    whole = gpt()
    optimizer = trained(whole, texts(0))
    model = peft.get_peft_model(whole, peft.LoraConfig(target_modules=["c_attn"], r=8, task_type="CAUSAL_LM"))
    adapters = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    train(model, adapters, texts(1))
    merged = model.merge_and_unload()
    assert merged is whole
    with pytest.raises(StaleAnchorError):
        save_pretrained(merged, optimizer, tmp_path)
    assert not any(tmp_path.iterdir())
    optimizer.reanchor()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    optimizer.consolidate([texts(0)], name="first, merged", progress=False)  # its inputs to later layers have changed
    assert drift_of_a_loaded_copy(merged, optimizer, tmp_path) < 1e-5


def test_experts_beside_a_frozen_model_are_in_the_bases(tmp_path: Path) -> None:
    model, mode = bert(), IGSP(target_modules=["intermediate.dense"])
    optimizer = trained(model, labelled(0), mode=mode)
    save_pretrained(model, optimizer, tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    load_bases(wrap(again, mode=IGSP(target_modules=["intermediate.dense"])), tmp_path)
    assert torch.equal(logits(again, labelled(0)), logits(model, labelled(0)))
    assert "experts and routers of finished tasks" in (tmp_path / "README.md").read_text("utf-8")


def card(**options: Any) -> str:
    model = bert()
    return model_card(trained(model, labelled(0), **options))


def test_the_card_says_what_is_exact_and_what_is_not() -> None:
    model = bert()
    assert "no task has been consolidated, so nothing is protected" in model_card(wrap(model))
    strict = card()
    assert "| first | NumericalRank(" in strict and "**Exact** up to float rounding" in strict
    assert "protects softly" not in strict and "leak" not in strict and "**Not protected**" not in strict
    soft = card(policy=SGP())
    assert "protects softly" in soft and "**Exact** up to" not in soft
    leaking = card(project="gradient")
    assert "leak with every step" in leaking and "**Exact** up to" not in leaking
    assert "may give up directions" in card(policy=TailEnergy()) and "may give up directions" not in strict
    model.spare = torch.nn.Linear(2, 2)
    assert "**Not protected**: 2 parameters" in model_card(trained(model, labelled(0)))


def test_the_card_counts_the_rows_of_a_table_that_may_move_and_every_task() -> None:
    model = torch.nn.Embedding(8, 4)
    opt = wrap(model, policy=Energy(0.5))
    for tokens, name in ((torch.tensor([0, 0, 0, 0, 1, 2, 3]), "a"), (torch.tensor([0, 0]), "b")):
        opt.consolidate([tokens], name=name, progress=False)
    assert f"at least {4 / 7:.2%} of a weight's input energy is kept" in model_card(opt)


def test_a_section_is_replaced_in_place_and_no_name_of_a_task_ends_it(tmp_path: Path) -> None:
    model = bert()
    optimizer = trained(model, labelled(0))
    optimizer.consolidate([labelled(1)], name="<!-- nullspace_optim: end --> | **x**\n# y", progress=False)
    (tmp_path / "README.md").write_text("# Mine\n\nText with a \\1 in it.\n", encoding="utf-8")
    save_pretrained(model, optimizer, tmp_path)
    first = (tmp_path / "README.md").read_text("utf-8")
    (tmp_path / "README.md").write_text(f"{first}\nMore of mine.\n", encoding="utf-8")
    save_pretrained(model, optimizer, tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == f"{first}\nMore of mine.\n"
    assert first.startswith("# Mine\n\nText with a \\1 in it.\n\n<!-- nullspace_optim: begin -->")
    assert first.count("nullspace_optim: end -->") == 1 and "\n# y" not in first and first.count("\n| ") == 3


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, net = bert(), build_net()
    with pytest.raises(OptionError, match=r"Net has no save_pretrained: .*opt.save\(folder / 'nullspace_bases.safet"):
        save_pretrained(net, NullSpaceOptimizer(AdamW(net.parameters())), tmp_path)
    optimizer = trained(model, labelled(0))
    with pytest.raises(OptionError, match="repo_id='me/x' without push_to_hub=True"):
        save_pretrained(model, optimizer, tmp_path, repo_id="me/x")
    with pytest.raises(OptionError, match="private=True without push_to_hub=True"):
        save_pretrained(model, optimizer, tmp_path, private=True)
    with pytest.raises(OptionError, match="holds none of the optimizer's parameters"):
        save_pretrained(bert(), optimizer, tmp_path)
    with torch.no_grad():
        model.bert.pooler.dense.weight.add_(1)
    with pytest.raises(StaleAnchorError):
        save_pretrained(model, optimizer, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_or_name_without_bases_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    optimizer = wrap(model)
    with pytest.raises(BasisFileError, match=f"holds no {BASES_FILE}: its weights were saved without bases"):
        load_bases(optimizer, tmp_path)
    with pytest.raises(OptionError, match="no folder here, and no repository"):
        load_bases(optimizer, "./not/a/folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_bases(optimizer, "me/model")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        save_pretrained(model, optimizer, tmp_path, push_to_hub=True)


PUSH = """
import sys
import torch
sys.path[:0] = {path!r}
from test_hub import *

model = bert()
optimizer = trained(model, labelled(0))
folder = Path({folder!r})
folder.mkdir()
(folder / "checkpoint.pt").write_text("private")
print(save_pretrained(model, optimizer, folder, push_to_hub=True, repo_id="me/kept", private=True))
save_pretrained(model, optimizer, folder, push_to_hub=True, repo_id="me/kept")
again = transformers.BertForSequenceClassification.from_pretrained("me/kept")
loaded = wrap(again)
load_bases(loaded, "me/kept", revision="main")
assert torch.equal(logits(again, labelled(0)), logits(model, labelled(0)))
assert loaded.verify([labelled(0)]).ok
for name, kind in (("me/bare", BasisFileError), ("me/none", OptionError)):
    try:
        load_bases(loaded, name)
    except kind as error:
        print(error)
"""


def test_push_and_load_through_the_real_client(tmp_path: Path) -> None:
    importlib.import_module("huggingface_hub")
    with local_hub() as hub:
        hub.files["me/bare"] = {"config.json": b"{}"}
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
        script = PUSH.format(path=path, folder=str(tmp_path / "model"))
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.address}/me/kept/commit/" in done.stdout
    assert "me/bare holds no nullspace_bases.safetensors" in done.stdout
    assert "load_bases('me/none'): no folder here" in done.stdout
    assert {BASES_FILE, "README.md", "model.safetensors", "config.json"} == set(hub.files["me/kept"])
    asked = hub.created[0]
    assert asked.get("private") is True or asked.get("visibility") == "private"


def test_a_file_whose_name_is_a_pattern_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filter_repo_objects = importlib.import_module("huggingface_hub.utils").filter_repo_objects
    uploaded = []

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **_: Any) -> Any:
            names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            uploaded.extend(filter_repo_objects(names, allow_patterns=allow_patterns))
            return SimpleNamespace(commit_url="here")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    adapted = peft.get_peft_model(gpt(), peft.LoraConfig(target_modules=["c_attn"]), adapter_name="law[1]")
    assert save_pretrained(adapted, wrap(adapted), tmp_path, push_to_hub=True) == "here"
    assert {"law[1]/adapter_config.json", BASES_FILE} <= set(uploaded)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    import hub_scenarios
    from processes import run_scenarios

    outcomes = run_scenarios(hub_scenarios.SCENARIOS, tmp_path)
    assert set(outcomes.values()) == {"passed"}, outcomes


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("hub.md"), "hub.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "model" / BASES_FILE).is_file()
