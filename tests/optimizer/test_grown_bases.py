"""Bases of a weight that has grown travel: by name, in files and checkpoints, in copies, to a new wrapper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import NEW, OLD, mlp, relative_drift, train, wrap

from nullspace_optim import NullSpaceOptimizer, NumericalRank
from nullspace_optim.cli import main
from nullspace_optim.errors import NullSpaceWarning, ShapeError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def widen(head: nn.Linear, count: int = 4) -> nn.Linear:
    """Return a head with `count` more rows behind the old ones."""
    wider = nn.Linear(head.in_features, head.out_features + count)
    wider.weight.data[: head.out_features] = head.weight.data
    wider.bias.data[: head.out_features] = head.bias.data
    return wider


def grown(model: nn.Sequential) -> nn.Sequential:
    """Return another model with the same values and a wider head, as a fresh process builds it."""
    twin = copy.deepcopy(model)
    twin[2] = widen(twin[2])
    return twin


def holds(optimizer: Any, model: nn.Module, before: Tensor, inputs: Tensor = OLD) -> None:
    """Train all outputs and assert that new ones learn while those of `inputs` stay."""
    start = float((model(NEW) - 1).square().mean())
    end = train(optimizer, model, 30)
    assert end < 0.8 * start
    assert relative_drift(model(inputs)[:, : before.shape[1]], before) < 1e-5


@pytest.mark.fault(123)
@pytest.mark.parametrize("bias", ["freeze", "joint"])
def test_bases_load_into_a_fresh_model_with_a_wider_head(bias: str, tmp_path: Path) -> None:
    model = mlp()
    optimizer = wrap(model, bias=bias)
    optimizer.consolidate([OLD], name="old", progress=False)
    before = model(OLD).detach()
    optimizer.save(tmp_path / "bases.safetensors")
    fresh = grown(model)
    other = wrap(fresh, bias=bias)
    other.load(tmp_path / "bases.safetensors")
    with pytest.warns(NullSpaceWarning, match=r"'2\.weight' has grown from 8 to 12 rows"):
        holds(other, fresh, before)
    other.save(tmp_path / "again.safetensors")  # grown, not consolidated since
    last = grown(fresh)
    third = wrap(last, bias=bias)
    third.load(tmp_path / "again.safetensors")
    with pytest.warns(NullSpaceWarning, match=r"'2\.weight' has grown from 8 to 16 rows"):
        holds(third, last, before)
    third.consolidate([NEW[:3]], name="new", progress=False)
    assert third.bases["2.weight"].shape == (16, 16)
    third.save(tmp_path / "whole.safetensors")
    narrow = mlp()
    with pytest.raises(ShapeError, match=r"'2\.weight' is \(8, 16\), its basis was made for \(16, 16\)"):
        wrap(narrow, bias=bias).load(tmp_path / "whole.safetensors")


@pytest.mark.fault(123)
def test_bases_do_not_load_where_the_old_rows_are_not_in_front(tmp_path: Path) -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    optimizer.save(tmp_path / "bases.safetensors")
    fresh = grown(model)
    fresh[2].weight.data = fresh[2].weight.data.flip(0)
    other = wrap(fresh)
    with pytest.raises(ShapeError, match=r"'2\.weight' is \(12, 16\).*copy the old values"):
        other.load(tmp_path / "bases.safetensors")
    assert not other.bases


@pytest.mark.fault(123)
def test_a_state_dict_brings_its_bases_to_a_wider_head() -> None:
    model = mlp()
    optimizer = wrap(model, SGD(model.parameters(), lr=0.03))
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    fresh = grown(model)
    other = wrap(fresh, SGD(fresh.parameters(), lr=0.03))
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(NullSpaceWarning, match="has grown from 8 to 12 rows"):
        holds(other, fresh, before)


@pytest.mark.fault(123)
def test_the_command_line_verifies_a_wider_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    optimizer.save(tmp_path / "bases.safetensors")
    save_file(grown(model).state_dict(), tmp_path / "model.safetensors")
    assert main(["verify", str(tmp_path / "bases.safetensors"), str(tmp_path / "model.safetensors")]) == 0
    assert "0 moved" in capsys.readouterr().out


@pytest.mark.fault(124)
@pytest.mark.parametrize("where", ["in the model", "in a new model"])
def test_a_new_wrapper_takes_over_the_bases_of_a_head_that_has_grown(where: str) -> None:
    model = mlp()
    first = wrap(model)
    first.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    if where == "in the model":
        model[2] = widen(model[2])
    else:
        model = nn.Sequential(model[0], model[1], widen(model[2]))
    second = wrap(model)
    with pytest.warns(NullSpaceWarning, match="has grown from 8 to 12 rows"):
        holds(second, model, before)
    assert "2.weight" in second.bases and first._core.superseded


@pytest.mark.fault(124)
@pytest.mark.parametrize("twice", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.filterwarnings("ignore::nullspace_optim.errors.NullSpaceWarning")
def test_copies_of_a_head_that_has_grown_are_protected(twice: Any) -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    before = model(OLD).detach()
    model[2] = widen(model[2])
    optimizer.add_param_group({"params": model[2].parameters()})
    train(optimizer, model, 2)
    twin, other = twice((model, optimizer))
    for one, mine in ((optimizer, model), (other, twin)):
        holds(one, mine, before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    other.consolidate([NEW[:3]], progress=False)
    kept = twin(NEW[:3]).detach()
    holds(other, twin, kept, NEW[:3])
    assert optimizer.bases["2.weight"].shape == (8, 16) and other.bases["2.weight"].shape == (12, 16)


@pytest.mark.fault(121)
@pytest.mark.filterwarnings("ignore::nullspace_optim.errors.NullSpaceWarning")
def test_reanchor_accepts_the_old_rows_and_leaves_new_ones_free() -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    model[2].weight.data = torch.cat([2 * model[2].weight.data, torch.zeros(4, 16)])
    model[2].bias.data = torch.cat([model[2].bias.data, torch.zeros(4)])
    with pytest.raises(ShapeError, match="does not begin with what is kept"):
        train(optimizer, model, 1)
    optimizer.reanchor()
    holds(optimizer, model, model(OLD).detach()[:, :8])
    assert optimizer.bases["2.weight"].shape == (8, 16)


@pytest.mark.fault(121)
@pytest.mark.filterwarnings("ignore::nullspace_optim.errors.NullSpaceWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_with_new_tokens_keeps_the_logits_of_old_ones(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    base = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    optimizer = NullSpaceOptimizer(base, model, policy=NumericalRank())
    old, mixed = torch.arange(4).reshape(1, 4), torch.randint(2, 44, (4, 8))
    optimizer.consolidate([{"input_ids": old}], progress=False)
    before = model.eval()(old).logits.detach()
    model.resize_token_embeddings(44, mean_resizing=False)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # a head of its own is a new module
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(mixed, labels=mixed).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert relative_drift(model(old).logits[..., :40], before) < 1e-5
    optimizer.consolidate([{"input_ids": mixed[:1]}], progress=False)
    assert optimizer.bases["transformer.wte.weight"].shape == (44, 16)
    assert optimizer.verify([{"input_ids": old}]).ok


@pytest.mark.fault(125)
@pytest.mark.parametrize("use", ["consolidate", "save", "state_dict"])
def test_a_module_that_the_optimizer_does_not_know_of_is_named_once(
    use: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    model[2] = nn.Linear(16, 8)
    actions = {
        "consolidate": lambda name: optimizer.consolidate([NEW[:2]], name=name, progress=False),
        "save": lambda name: optimizer.save(tmp_path / name),
        "state_dict": lambda name: optimizer.state_dict(),
    }
    with pytest.warns(NullSpaceWarning, match=r"2\.bias, 2\.weight \(2 parameters\) are protected but no longer in"):
        actions[use]("one")
    recwarn.clear()
    for number, action in enumerate(actions.values()):
        action(f"again {number}")
    assert not [w for w in recwarn.list if "no longer in the model" in str(w.message)]
    report = optimizer.verify()
    assert not report.ok and set(report.lost) == {"2.weight", "2.bias"}


@pytest.mark.fault(125)
def test_parameters_under_another_name_are_not_called_lost(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.consolidate([OLD], progress=False)
    model[2] = nn.Sequential(model[2])  # as adapters wrap a layer
    recwarn.clear()
    optimizer.state_dict()
    train(optimizer, model, 3)
    assert optimizer.verify().ok and not recwarn.list
