"""Recognition of a sample's task: against dense formulas, and one choice for all layers of a tower."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from synthetic import SyntheticTask, make, small_llama, train
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import DynamicCache

from nullspace_optim import IGSP, NullSpaceOptimizer, NullSpaceWarning, clip_forward
from nullspace_optim.errors import ConsolidationError, OptionError
from nullspace_optim.igsp.moe.context import RoutingContext
from nullspace_optim.igsp.moe.recognition import TaskRecognition, tower_of

TOKENS = torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(0))


def small_clip() -> open_clip.CLIP:
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=24, heads=2, layers=2),
    )


def images(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def clip_step(model: open_clip.CLIP, opt: NullSpaceOptimizer, x: Tensor) -> None:
    scores = model.encode_image(x, normalize=True) @ model.encode_text(TOKENS, normalize=True).T
    opt.zero_grad()
    F.cross_entropy(10 * scores, torch.arange(len(x)) % 4).backward()
    opt.step()


def recognition(tasks: list[Tensor], width: int = 24) -> TaskRecognition:
    """Tasks whose samples `[n, d]` came in batches of 50."""
    made = TaskRecognition(RoutingContext(IGSP().plan(None)), width, 0, torch.device("cpu"))
    for x in tasks:
        for part in x.split(50):
            made.see(part)
            assert made.found is not None
            made.rows.append(made.found)
        made.finish(made.collect())
    return made


def features(made: TaskRecognition, x: Tensor) -> Tensor:
    made.see(x)
    assert made.found is not None
    return made.found


def drawn(place: float, count: int = 200, width: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return place * torch.sin(torch.arange(width) * (1 + place)) + torch.randn(count, width, generator=generator)


def test_distances_are_those_of_one_covariance_computed_densely() -> None:
    tasks = [drawn(place, seed=seed) for seed, place in enumerate((0.0, 2.0, 4.0))]
    made = recognition(tasks)
    rows = [features(made, x).double() for x in tasks]
    size, count = rows[0].shape[1], sum(map(len, rows))
    pooled = sum((r - r.mean(0)).T @ (r - r.mean(0)) for r in rows) / count
    share = size / (count + size)
    covariance = (1 - share) * pooled + share * pooled.trace() / size * torch.eye(size, dtype=torch.float64)
    new = features(made, drawn(1.0, 7, seed=9)).double()
    for task, own in enumerate(rows):
        apart = new - own.mean(0)
        expected = (apart * torch.linalg.solve(covariance, apart.T).T).sum(dim=1) / size
        torch.testing.assert_close(made.distances(new.float())[:, task].double(), expected, rtol=1e-3, atol=1e-4)


def test_limits_are_three_deviations_above_the_mean_of_own_distances() -> None:
    made = recognition([drawn(0.0, 4000)])
    own = made.distances(features(made, drawn(0.0, 4000)))[:, 0]
    torch.testing.assert_close(made.scales[0], own.mean(), rtol=0.02, atol=0.0)
    torch.testing.assert_close(made.limits[0] * own.mean(), own.mean() + 3 * own.std(), rtol=0.05, atol=0.0)


def test_the_scale_of_a_task_follows_the_common_covariance() -> None:
    made = recognition([drawn(0.0, 2000), 3.0 * drawn(0.0, 2000, seed=1)])
    own = made.distances(features(made, drawn(0.0, 2000)))[:, 0]
    torch.testing.assert_close(made.scales[0], own.mean(), rtol=0.1, atol=0.0)


def test_a_task_of_wider_samples_is_told_from_a_narrow_one_at_the_same_place() -> None:
    made = recognition([drawn(0.0), 2.0 * drawn(0.0, seed=1)])
    narrow, wide = (made.choose(features(made, scale * drawn(0.0, 100, seed=5))) for scale in (1.0, 2.0))
    assert float((narrow == 0).float().mean()) > 0.9 and float((wide == 1).float().mean()) > 0.9


def test_each_sample_finds_its_task_and_strangers_find_none() -> None:
    made = recognition([drawn(place, seed=seed) for seed, place in enumerate((0.0, 2.0, 4.0))])
    inputs = torch.cat([*(drawn(place, 20, seed=7) for place in (0.0, 2.0, 4.0)), torch.full((1, 24), 60.0)])
    found = made.choose(features(made, inputs))
    expected = torch.tensor([0] * 20 + [1] * 20 + [2] * 20 + [-1])
    assert float((found == expected).float().mean()) > 0.93 and found[-1] == -1
    assert [int(made.choose(features(made, row[None]))) for row in inputs] == found.tolist()
    assert recognition([]).choose(features(made, inputs)).tolist() == [-1] * 61


@pytest.mark.parametrize("count", [0, 1, 3])
def test_tasks_of_few_samples_stay_finite(count: int) -> None:
    made = recognition([drawn(0.0, 200), drawn(3.0, count)])
    assert all(bool(torch.isfinite(value).all()) for value in made.known.values())
    found = made.choose(features(made, drawn(3.0, max(1, count))))
    assert (found == 1).all() if count else (found != 1).all()


def test_a_pool_lowers_the_limits_until_few_of_it_lie_within() -> None:
    made = recognition([drawn(0.0, 400)])
    pool = 0.8 + drawn(0.0, 400, seed=3)
    before = float((made.choose(features(made, pool)) == 0).float().mean())
    made.rows.append(features(made, pool))
    made.calibrate(made.collect())
    within = float((made.choose(features(made, pool)) == 0).float().mean())
    assert within < 0.5 * before and 1 <= made.limits[0] <= 1 + 6 * made.spreads[0, 1]
    far = recognition([drawn(0.0, 400)])
    far.rows.append(features(far, drawn(0.0, 400) + 50))
    far.calibrate(far.collect())
    torch.testing.assert_close(far.limits[0], 1 + 6 * far.spreads[0, 1])


def prompts(seed: int, count: int = 40, width: int = 24) -> Tensor:
    """Sentences of one kind: far from each other, and from those of another `seed`, around one place."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_prompts_that_come_in_every_batch_are_known_one_by_one() -> None:
    lists = [prompts(1), prompts(2, 12), prompts(3, 1)]
    made = recognition([x.repeat(4, 1) for x in lists] + [prompts(4, 400)])
    assert made.owners.bincount().tolist() == [40, 12, 1, 1] and len(made.centres) == 54
    rows = torch.cat([features(made, x) for x in lists]).double()
    whole = torch.linalg.inv(made.whiten.double() @ made.whiten.double().T)
    new = features(made, prompts(9, 7)).double()
    apart = new[:, None] - rows[:40]
    dense = (apart * torch.linalg.solve(whole, apart.mT).mT).sum(dim=2).amin(dim=1) / rows.shape[1]
    torch.testing.assert_close(made.distances(new.float())[:, 0].double(), dense, rtol=1e-3, atol=1e-4)
    made.calibrate(features(made, prompts(5, 200)))
    for task, x in enumerate(lists):
        assert made.choose(features(made, x)).tolist() == [task] * len(x), "all of them, whatever the pool"
        close = features(made, x + 1e-3 * prompts(6, len(x)))
        assert made.choose(close).tolist() == [task] * len(x), "another batch rounds otherwise"
    strangers = made.choose(features(made, prompts(7, 300)))
    shares = [float((strangers == task).float().mean()) for task in range(3)]
    assert max(shares) <= 0.1, "few of a kind that the pool has seen"


def test_a_single_batch_tells_nothing_of_what_comes_again() -> None:
    made = recognition([prompts(1)])
    assert len(made.centres) == 1 and float(made.spreads[0, 1]) > 0
    torch.testing.assert_close(made.centres[0], features(made, prompts(1)).mean(dim=0))


def test_towers_are_chains_of_blocks() -> None:
    clip = small_clip()
    assert tower_of("visual.transformer.resblocks.1.mlp", clip) == "visual.transformer"
    assert tower_of("transformer.resblocks.0.mlp", clip) == "transformer"
    assert tower_of("0", nn.Sequential(nn.Linear(2, 2))) == "" and tower_of("fc", nn.Module()) == ""
    assert tower_of("blocks.0.mlp", nn.ModuleDict({"blocks": nn.Sequential(nn.Module())})) == "blocks"


@pytest.fixture(scope="module")
def trained() -> tuple[open_clip.CLIP, NullSpaceOptimizer]:
    """Two tasks of one CLIP, of bright and of dark images."""
    torch.manual_seed(0)
    model = small_clip()
    mode = IGSP(rank=2, candidates=2, cap=3, window=1, lr=0.05)
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=mode)
    for name, shift in (("bright", 2.0), ("dark", -2.0)):
        for step in range(6):
            clip_step(model, opt, images(step) + shift)
        loader = [images(seed, 64) + shift for seed in range(20, 28)]
        opt.consolidate(loader, name=name, forward=clip_forward(model, TOKENS), progress=False)
    return model, opt


def test_without_a_name_all_layers_of_a_tower_follow_one_choice(trained: tuple[open_clip.CLIP, object]) -> None:
    model, opt = trained
    assert isinstance(opt, NullSpaceOptimizer)
    mixed = torch.cat([images(7, 4) + 2, images(9, 4) - 2, images(9, 2) * 50])
    names = ["bright"] * 4 + ["dark"] * 4 + [None] * 2
    with torch.no_grad(), opt.task(names):
        expected = model.encode_image(mixed)
    with torch.no_grad(), opt.task(None):
        found = model.encode_image(mixed)
        again = torch.cat([model.encode_image(one[None]) for one in mixed])
        model.encode_text(TOKENS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, expected)
    with torch.no_grad(), opt.task("bright"):
        assert not torch.equal(model.encode_image(mixed)[4:], found[4:]), "the context ends where it ends"
    assert opt.mode.experts.scope.looking is None


def test_prompts_of_clip_forward_are_known_one_by_one(
    trained: tuple[open_clip.CLIP, NullSpaceOptimizer],
) -> None:
    _, opt = trained
    towers = [layer.recognition for layer in opt.mode.experts.layers if layer.recognition is not None]
    assert [one.owners.tolist() for one in towers] == [[0, 1], [0] * len(TOKENS) + [1] * len(TOKENS)]
    assert all(one.rows == [] and one.batches == 0 for one in towers)


def test_a_pass_that_failed_leaves_nothing_for_the_next(trained: tuple[open_clip.CLIP, NullSpaceOptimizer]) -> None:
    model, opt = copy.deepcopy(trained)

    def broken():  # type: ignore[no-untyped-def]
        yield images(1, 64)
        raise RuntimeError("gone")

    limits = []
    for fails in (False, True):
        if fails:
            with pytest.raises(RuntimeError, match="gone"):
                opt.mode.calibrate(broken(), forward=clip_forward(model, TOKENS), progress=False)
            with pytest.raises(ConsolidationError, match="no finite sample of the loader reached a layer with experts"):
                opt.mode.calibrate([images(1, 4)], forward=lambda _: torch.zeros(1), progress=False)
        opt.mode.calibrate([images(12, 64) + 1.6] * 2, forward=clip_forward(model, TOKENS), progress=False)
        towers = [layer.recognition for layer in opt.mode.experts.layers if layer.recognition is not None]
        limits.append(torch.cat([one.limits for one in towers]))
    assert torch.equal(*limits)


def test_a_pool_makes_unknown_inputs_run_the_backbone(trained: tuple[open_clip.CLIP, object]) -> None:
    model, opt = trained
    assert isinstance(opt, NullSpaceOptimizer)
    other = images(11, 32) + 1.6
    with torch.no_grad(), opt.task("none of them"):
        plain = model.encode_image(other)
    shares = []
    for _ in range(2):
        with torch.no_grad(), opt.task(None):
            same = (model.encode_image(other) - plain).norm(dim=1) < 1e-6
        shares.append(float(same.float().mean()))
        pool = [images(seed, 64) + 1.6 for seed in (12, 13)]
        opt.mode.calibrate(pool, forward=clip_forward(model, TOKENS), progress=False)
    assert shares[0] < shares[1] and shares[1] > 0.8


def test_recognition_follows_copies_files_and_failures(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, opt = make(cap=20)
    train(model, opt, SyntheticTask(0), 30)
    opt.consolidate(SyntheticTask(0).loader(), name="one", progress=False)
    known = {name: value.clone() for name, value in opt.mode.experts.layers[0].known.items()}
    train(model, opt, SyntheticTask(2), 5)

    def broken():  # type: ignore[no-untyped-def]
        yield SyntheticTask(2).inputs(1)
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        opt.consolidate(broken(), name="two", progress=False)
    opt.save(tmp_path / "f")
    _, other = make(seed=3, cap=20)
    other.load(tmp_path / "f")
    for here in (opt, other):
        recognised = here.mode.experts.layers[0].recognition
        assert all(torch.equal(recognised.known[name], value) for name, value in known.items())
        assert recognised.rows == [] and recognised.choose(features(recognised, SyntheticTask(0).inputs(3))).eq(0).any()


def test_a_pool_needs_a_finished_task_and_its_own_router() -> None:
    model, opt = make(cap=10)
    with pytest.raises(OptionError, match=r"finished: 0, router='per-task'"):
        opt.mode.calibrate([SyntheticTask(0).inputs(0)])
    model, opt = make(cap=10, router="shared")
    train(model, opt, SyntheticTask(0), 12)
    opt.consolidate(SyntheticTask(0).loader(), progress=False)
    with pytest.raises(OptionError, match=r"finished: 1, router='shared'"):
        opt.mode.calibrate([SyntheticTask(0).inputs(0)])


def test_a_tower_that_no_sample_passed_is_announced_and_never_recognises() -> None:
    torch.manual_seed(0)
    model = small_clip()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-4), model, mode=IGSP(rank=2, cap=3))
    for step in range(6):
        clip_step(model, opt, images(step))
    with pytest.warns(NullSpaceWarning, match=r"around 'transformer\.resblocks\.1\.mlp' as a whole: without a name"):
        opt.consolidate([images(9)], name="one", forward=model.encode_image, progress=False)
    with torch.no_grad(), opt.task("never"):
        plain = model.encode_text(TOKENS)
    with torch.no_grad(), opt.task(None):
        assert torch.equal(model.encode_text(TOKENS), plain)


def test_an_error_while_the_backbone_looks_leaves_no_trace(trained: tuple[open_clip.CLIP, NullSpaceOptimizer]) -> None:
    model, opt = trained
    x = images(5) + 2.0
    with torch.no_grad(), opt.task(None):
        before = model.encode_image(x)
        with pytest.raises(RuntimeError):
            model.encode_image(x[:, :2])
        with pytest.raises(RuntimeError):
            model.visual.transformer(torch.zeros(2, 5, 3))
        assert torch.equal(model.encode_image(x), before)


def test_sums_stay_wide_in_a_model_of_half_precision() -> None:
    made = recognition([drawn(0.0), drawn(2.0, seed=1)])
    made.half()
    assert all(
        value.dtype == (torch.int64 if name == "owners" else torch.float32) for name, value in made.known.items()
    )
    assert float((made.choose(features(made, drawn(2.0, 50, seed=7).half())) == 1).float().mean()) > 0.9


def test_samples_that_are_not_finite_are_left_out_with_a_warning() -> None:
    made = recognition([drawn(0.0)])
    broken = drawn(0.0, 20)
    broken[3, 0] = float("nan")
    made.rows.append(features(made, broken))
    with pytest.warns(NullSpaceWarning, match="1 of 20 samples are not finite"):
        made.calibrate(made.collect())
    assert bool(torch.isfinite(made.limits).all())


def test_a_cache_that_would_be_filled_twice_is_refused() -> None:
    model = small_llama()
    opt = NullSpaceOptimizer(AdamW(model.parameters(), lr=1e-3), model, mode=IGSP(rank=2, top_k=1, cap=1))
    tokens = torch.arange(8)[None]
    model(tokens).logits.sum().backward()
    opt.step()
    opt.consolidate([tokens], name="one", progress=False)
    with torch.no_grad(), opt.task(None):
        with pytest.raises(OptionError, match="= twice: name the task"):
            model(tokens, past_key_values=DynamicCache(config=model.config))
        model(tokens)
