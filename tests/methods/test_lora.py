"""LoRAs, prompts and classes: what old inputs cannot see stays what it was, exactly where the paper says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference_impl as slow
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from training import relative_drift, train

from nullspace_optim import Energy, Fate, NullSpaceOptimizer, NumericalRank
from nullspace_optim.errors import BatchError, OptionError
from nullspace_optim.methods import (
    begin_lora,
    consolidate_classes,
    declare_prompt,
    declare_rows,
    declare_tokens,
    inflora_rows,
    keeplora_rows,
    lora_rows,
)
from nullspace_optim.policies import CGP, PEGP, VPTNSP, InfLoRA, KeepLoRA, SplitLoRA

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows).tanh())


def rows(seed: int, n: int = 24, rank: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)


def adapted(policy: Any) -> tuple[Any, NullSpaceOptimizer]:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first"], lora_dropout=0.0)
    model = peft.get_peft_model(Net(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, NullSpaceOptimizer(AdamW(trained, lr=0.02, weight_decay=0.01), model, policy=policy)


# ---- LoRA


@pytest.mark.parametrize("method", ["inflora", "keeplora", "splitlora"])
def test_a_lora_of_allowed_rows_keeps_old_outputs_through_200_adamw_steps(method: str) -> None:
    model, optimizer = adapted(Energy(0.999999))
    train(optimizer, model, 30, rows(0))
    optimizer.consolidate([rows(0)], name="a", progress=False)
    before, other = model(rows(0)), model(rows(1))
    if method == "inflora":
        new = inflora_rows(optimizer, optimizer.measure([rows(1)], progress=False))
    elif method == "keeplora":
        new = keeplora_rows(optimizer, [rows(1)], lambda batch: (model(batch) - 1).square().mean(), weight_energy=0.2)
    else:
        new = lora_rows(optimizer)
    begin_lora(optimizer, new)
    assert relative_drift(model(rows(0)), before) < 1e-5 and relative_drift(model(rows(1)), other) < 1e-5
    assert optimizer.verify().ok
    train(optimizer, model, 200, rows(1))
    assert optimizer.verify().ok
    assert relative_drift(model(rows(1)), other) > 0.1 and relative_drift(model(rows(0)), before) < 1e-3
    optimizer.consolidate([rows(1)], name="b", progress=False)
    second = model(rows(1))
    begin_lora(optimizer, lora_rows(optimizer, seed=1))
    train(optimizer, model, 200, rows(2))
    assert relative_drift(model(rows(0)), before) < 1e-3 and relative_drift(model(rows(1)), second) < 1e-2


def test_the_rows_are_the_papers() -> None:
    model, optimizer = adapted(Energy(0.99))
    optimizer.consolidate([rows(0)], name="a", progress=False)
    name = "base_model.model.first.lora_A.default.weight"
    U = optimizer.bases[name].subspaces["right"].basis
    outside = torch.eye(20, dtype=torch.float64) - slow.projector(U)[0]
    new = rows(1, rank=6)
    found = inflora_rows(optimizer, optimizer.measure([new], progress=False))[name].double()
    left = torch.linalg.svd(outside @ new.double().T @ new.double())[0][:, :4]
    assert slow.principal_angles(found.T * math.sqrt(3), left).max() < 1e-3
    assert torch.allclose(found @ found.T * 3, torch.eye(4, dtype=torch.float64), atol=1e-5)
    assert float((found @ U[0].double()).abs().max()) < 1e-6

    base = model.base_model.model.first.base_layer.weight
    found = keeplora_rows(optimizer, [new], lambda batch: model(batch).square().mean(), weight_energy=0.3)[
        name
    ].double()
    assert base.grad is None and not base.requires_grad
    base.requires_grad_(True)
    gradient = torch.autograd.grad(model(new).square().mean(), base)[0].double()
    base.requires_grad_(False)
    singular, inputs = torch.linalg.svd(base.double(), full_matrices=False)[1:]
    count = next(k for k in range(1, 17) if float((singular[:k] ** 2).sum() / (singular**2).sum()) >= 0.3)
    known = torch.linalg.qr(torch.cat([U[0].double(), inputs[:count].T], dim=1))[0]
    right = torch.linalg.svd(gradient @ (torch.eye(20, dtype=torch.float64) - known @ known.T))[2][:4].T
    assert slow.principal_angles(found.T, right).max() < 1e-3

    for done in (1, 2, 3):  # ||A_0|| / (t + 1), whatever the present A is
        U = optimizer.bases[name].subspaces["right"].basis
        drawn = lora_rows(optimizer)[name]
        assert float(drawn.norm()) == pytest.approx(math.sqrt(4 / 3) / (done + 1), rel=1e-5)
        assert float((drawn.double() @ U[0].double()).abs().max()) < 1e-6
        begin_lora(optimizer, {name: drawn})
        optimizer.consolidate([rows(done)], name=str(done), progress=False)
    first = [nn.Linear(400, 8, bias=False).weight for _ in range(20)]
    for weight in first:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as PEFT begins A
    assert float(torch.stack([weight.detach().norm() for weight in first]).mean()) == pytest.approx(
        math.sqrt(8 / 3), rel=0.01
    )


def test_begin_lora_names_what_does_not_fit() -> None:
    _, optimizer = adapted(Energy())
    name = "base_model.model.first.lora_A.default.weight"
    with pytest.raises(OptionError, match=r"no LoRA 'A' named 'first'; there are: base_model"):
        begin_lora(optimizer, {"first": torch.zeros(4, 20)})
    with pytest.raises(OptionError, match=r"rows \(4, 19\) for 'base_model.*\(4, 20\)"):
        begin_lora(optimizer, {name: torch.zeros(4, 19)})


def test_thresholds_of_the_lora_policies() -> None:
    import dataclasses

    from spectra import spectrum

    flat = spectrum([1.0] * 100)
    late = dataclasses.replace(flat, tasks=5)
    assert InfLoRA(0.5, last=0.9, tasks=10).rank(flat) == 50 and InfLoRA(0.5, last=0.9, tasks=10).rank(late) == 70
    assert InfLoRA(0.5, last=0.9, tasks=2).rank(late) == 90
    assert InfLoRA(0.5, last=0.9, tasks=10, paper_code=True).rank(flat) == 49  # GPM's count, handed on
    assert KeepLoRA().threshold == 0.99 and PEGP().threshold == 0.9 and CGP().similarity == 0.5
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).sort(descending=True).values.pow(4).tolist()
    for tasks in (0, 3, 20):
        loss = [(tasks + 1) * (1 - sum(values[:k]) / sum(values)) - 2.0 * (30 - k) / 30 for k in range(31)]
        seen, best = dataclasses.replace(spectrum(values), tasks=tasks), loss.index(min(loss))
        assert SplitLoRA(2.0).rank(seen) == max(1, best)
        dropped = max(best - 1, 1) + 1  # columns, by the released code's 0-based index
        assert SplitLoRA(2.0, paper_code=True).rank(seen) == dropped
    steep = spectrum([1.0, 1e-3, 1e-4, 1e-5])
    assert SplitLoRA(2.0).rank(steep) == 1 and SplitLoRA(2.0, paper_code=True).rank(steep) == 2


# ---- prompts


class Attention(nn.Module):
    """Two heads of width four over tokens `[b, n, 8]` and three prompts, as keys and values."""

    def __init__(self, groups: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 3, 8) if groups else torch.randn(3, 8))
        self.qkv = nn.Linear(8, 24, bias=False).requires_grad_(False)
        self.head = nn.Linear(8, 2, bias=False).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        joined = torch.cat([self.prompt.reshape(1, 3, 8).expand(len(tokens), -1, -1), tokens], dim=1)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(joined).chunk(3, dim=2))
        q = q[:, :, 3:]
        attention = (q @ k.mT / 2).softmax(-1)
        declare_prompt(self.prompt, q, self.qkv.weight[8:16], attention[..., :3])
        return self.head((attention @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("policy", [NumericalRank(1e-4), VPTNSP(eta=1.0), VPTNSP(0.9)], ids=["all", "elbow", "soft"])
def test_a_prompt_is_kept_on_both_sides(policy: Any, groups: bool) -> None:
    model = Attention(groups)
    old = torch.randn(1, 1, 8)  # one token, two heads: two of eight directions on the right, two of three on the left
    before = model(old).detach()
    optimizer = NullSpaceOptimizer(AdamW([model.prompt], lr=0.05), model, policy=policy)
    optimizer.consolidate([old], progress=False)
    basis = optimizer.bases["prompt"]
    assert basis.fate is Fate.PROTECTED and set(basis.subspaces) == {"right", "left"}
    start = model.prompt.detach().clone()
    train(optimizer, model, 200, torch.randn(16, 4, 8))
    assert optimizer.verify().ok and relative_drift(model.prompt, start) > 1e-2
    drift = relative_drift(model(old), before)
    right, left = (basis.subspaces[side].basis[0] for side in ("right", "left"))
    moved = (model.prompt.detach() - start).reshape(3, 8)
    if isinstance(policy, NumericalRank) or policy.eta == 1:
        assert float((moved @ right).norm() + (left.mT @ moved).norm()) < 1e-5
    if isinstance(policy, NumericalRank):
        assert drift < 1e-4
    elif policy.eta < 1:
        parts = basis.subspaces
        assert all(bool((s.scale[s.basis.any(1)] == policy.eta).all()) for s in parts.values()) and drift > 1e-4


def test_both_sides_of_a_prompt_are_the_papers_matrices() -> None:
    """`K_1 = sum_h (Q_h W_k,h)^T (Q_h W_k,h)` and `K_2 = S_P^T S_P` (VPT-NSP, eq. 9 to 14), by loops."""
    model, old = Attention(groups=False), torch.randn(5, 4, 8)
    optimizer = NullSpaceOptimizer(AdamW([model.prompt]), model, policy=VPTNSP())
    optimizer.consolidate([old[:2], old[2:]], progress=False)
    first, second = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for tokens in old:
        joined = torch.cat([model.prompt, tokens]).detach()
        queries, keys = (joined @ model.qkv.weight[i : i + 8].detach().T for i in (0, 8))
        for head in (slice(0, 4), slice(4, 8)):
            rows_of_head = (queries[3:, head] @ model.qkv.weight[8:16][head].detach()).double()
            first += rows_of_head.T @ rows_of_head
            seen = (queries[3:, head] @ keys[:, head].T / 2).softmax(1)[:, :3].double()
            second += seen.T @ seen
    for side, moment in (("right", first), ("left", second)):
        part, values = optimizer.bases["prompt"].subspaces[side], torch.linalg.eigvalsh(moment).flip(0)
        assert torch.allclose(part.covariance[0].double(), moment, rtol=1e-4, atol=1e-5)
        found = values.tolist()
        bends = [found[i + 1] - 2 * found[i] + found[i - 1] for i in range(1, len(found) - 1)]
        assert part.rank == 1 + bends.index(max(bends))
        leading = torch.linalg.eigh(moment)[1].flip(1)[:, : part.rank]
        assert slow.principal_angles(part.basis[0], leading).max() < 1e-3


def test_the_elbow_is_the_second_difference_of_the_smoothed_spectrum() -> None:
    from scipy.ndimage import gaussian_filter1d
    from spectra import spectrum

    values = torch.cat([torch.linspace(10, 5, 40), torch.linspace(1, 0.1, 160)]).double().square()
    smooth, of_roots = (gaussian_filter1d(part.numpy(), 10, mode="reflect")[3:-3] for part in (values, values.sqrt()))
    elbow, other = (
        3 + max(range(1, len(part) - 1), key=lambda i: part[i + 1] - 2 * part[i] + part[i - 1])
        for part in (smooth, of_roots)
    )
    assert VPTNSP().rank(spectrum(values.tolist())) == elbow != other and 30 <= elbow <= 60
    assert VPTNSP().rank(spectrum([100.0, 81.0, 64.0, 1.0, 0.81, 0.64])) == 3
    assert VPTNSP().rank(spectrum([1.0, 1.0])) == 2


def test_prompt_tuning_learns_outside_old_tokens_and_prompts() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(BertForSequenceClassification(config), prompts)
    weight = model.prompt_encoder["default"].embedding.weight
    batch = {"input_ids": torch.randint(0, 12, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    optimizer = NullSpaceOptimizer(AdamW([weight], lr=0.05), model, policy=PEGP())
    optimizer.consolidate([batch], name="without", progress=False)
    assert optimizer.capacity()[next(iter(optimizer.bases))] == 0.0  # a looked-up row is kept as a whole
    optimizer.release(next(iter(optimizer.bases)))
    handle = declare_tokens(model)
    optimizer.consolidate([batch], name="a", progress=False)
    handle.remove()
    basis = next(iter(optimizer.bases.values()))
    embeddings = model.base_model.bert.embeddings.word_embeddings(batch["input_ids"]).reshape(-1, 32)
    seen = torch.cat([weight.detach().repeat(4, 1), embeddings]).detach()
    dense = slow.projector(basis.subspaces["right"].basis)[0]
    assert float((seen.double() @ dense).norm() ** 2 / seen.norm() ** 2) >= 0.9
    assert basis.subspaces["right"].rank == slow.gpm_rank(seen, None, 0.9)
    start = weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    moved = (weight.detach() - start).double()
    assert float(moved.norm()) > 1e-2 and float((moved @ dense).norm() / moved.norm()) < 1e-5
    with pytest.raises(OptionError, match="Net has 0 prompt embeddings"):
        declare_tokens(Net())


class Prefixed(nn.Module):
    """Two heads of width four over tokens `[b, n, 8]` and three keys and values of a prefix that no weight makes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(3, 8)) for _ in range(2))
        self.qkv = nn.Linear(8, 24, bias=False).requires_grad_(False)
        self.head = nn.Linear(8, 2, bias=False).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        count = len(tokens)
        joined = [torch.cat([p.expand(count, -1, -1), t], dim=1) for p, t in ((self.keys, k), (self.values, v))]
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (q, *joined))
        attention = (q @ k.mT / 2).softmax(-1)
        by_head = torch.zeros(*q.shape[:3], 2, 4)
        for head in range(2):
            by_head[:, head, :, head] = q[:, head]
        declare_rows(self.keys, by_head.flatten(3).reshape(-1, 8), "right")
        declare_rows(self.values, attention[..., :3].reshape(-1, 3), "left")
        return self.head((attention @ v).transpose(1, 2).flatten(2))


def test_a_prefix_is_kept_by_the_rows_of_its_keys_and_values() -> None:
    model, old = Prefixed(), torch.randn(1, 1, 8)  # two of eight directions of the keys, two of three of the values
    before = model(old).detach()
    optimizer = NullSpaceOptimizer(AdamW([model.keys, model.values], lr=0.05), model, policy=PEGP(1 - 1e-9))
    report = optimizer.consolidate([old], progress=False)
    assert {p.fate for p in report.parameters} == {Fate.PROTECTED}
    start = [p.detach().clone() for p in (model.keys, model.values)]
    train(optimizer, model, 200, torch.randn(16, 4, 8))
    assert optimizer.verify().ok and relative_drift(model(old), before) < 1e-4
    assert all(relative_drift(p, s) > 1e-2 for p, s in zip((model.keys, model.values), start))


def test_prefixes_that_peft_keeps_in_one_matrix_are_frozen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    prefixes = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(GPT2LMHeadModel(config), prefixes).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    batch = {"input_ids": torch.randint(0, 40, (4, 6))}
    optimizer = NullSpaceOptimizer(AdamW([weight], lr=0.05), model, policy=PEGP())
    optimizer.consolidate([batch], progress=False)
    before, start = model(**batch).logits.detach(), weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert weight.grad.any()
        optimizer.step()
    assert torch.equal(weight, start) and torch.equal(model(**batch).logits, before)


# ---- classes


def test_classes_are_consolidated_by_themselves_or_with_their_like() -> None:
    model = nn.Sequential(nn.Linear(20, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4, 20))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=CGP(0.9))
    labels = torch.arange(4).repeat(10)
    inputs = torch.zeros(40, 20)
    inputs[torch.arange(40), labels] = 5.0
    inputs[labels == 1, 0] = 4.0  # class 1 looks like class 0
    inputs[torch.arange(40), 4 + labels] = 1e-2 * torch.randn(40)
    wrong = torch.zeros(2, 20)
    wrong[:, 3], wrong[:, 19] = 9.0, 9.0  # labelled 2, but seen as 3
    batches = [(inputs, labels), (wrong, torch.tensor([2, 2]))]
    reports = consolidate_classes(optimizer, batches, lambda batch: batch[1], name="t", progress=False)
    assert list(reports) == [(0, 1), (2,), (3,)]
    assert optimizer.bases["0.weight"].tasks == ("t/0+1", "t/2", "t/3")
    U = optimizer.bases["0.weight"].subspaces["right"].basis
    for label in range(4):
        mine = inputs[labels == label].double()
        if label != 1:
            assert float((mine @ slow.projector(U)[0]).norm() ** 2 / mine.norm() ** 2) >= 0.9
    assert not U[0, 19].any()  # the wrong ones were left out
    assert float((U[0].mT @ U[0] - torch.eye(U.shape[2])).abs().max()) < 1e-6
    groups = [inputs[(labels == 0) | (labels == 1)], inputs[labels == 2], inputs[labels == 3]]
    one_by_one = slow.gpm_basis(groups, 0.9)  # GPM's rule, a group after the other
    assert U.shape[2] == one_by_one.shape[1] and slow.principal_angles(U[0], one_by_one).max() < 1e-3


def test_what_does_not_fit_is_named() -> None:
    model = nn.Sequential(nn.Linear(20, 4))
    optimizer = NullSpaceOptimizer(AdamW(model.parameters()), model, policy=CGP())
    with pytest.raises(BatchError, match=r"labels \(3,\) do not fit outputs \(2, 4\)"):
        consolidate_classes(optimizer, [torch.zeros(2, 20)], lambda batch: torch.zeros(3), name="t")
    plain = NullSpaceOptimizer(AdamW(nn.Linear(2, 2).parameters()), policy=Energy())
    with pytest.raises(OptionError, match="policy=CGP"):
        consolidate_classes(plain, [], lambda batch: batch, name="t")
