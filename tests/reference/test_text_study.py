"""The study of a sentence encoder, in small: a random BERT, three tasks of made-up words, nothing from the network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from nullspace_optim import NullSpaceOptimizer
from reference.errors import ExperimentError
from reference.studies import text
from reference.studies.encoder import Bed, embedded, load_bed, recall

transformers = pytest.importorskip("transformers", reason="the study is of a model of transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the study is of a model of transformers")
TASKS = ("birds", "cars", "trees")


def lines_of(task: int, numbers: range) -> str:
    """Pairs that share one word; a task's documents share half of theirs."""
    pairs = (
        {
            "query": f"w{n + 20 * task} w{n + 1}",
            "document": f"w{n + 20 * task} " + " ".join(f"w{m}" for m in range(n % 7)),
        }
        for n in numbers
    )
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("text")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{n}": n + 2 for n in range(90)}}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=92, **shape)).save_pretrained(root / "model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(root / "model")
    for number, task in enumerate(TASKS):
        (root / "data" / task).mkdir(parents=True)
        (root / "data" / task / "train.jsonl").write_text(lines_of(number, range(10)))
        (root / "data" / task / "test.jsonl").write_text(lines_of(number, range(10, 17)))
    (root / "data" / "pool.txt").write_text("".join(f"w{n} w{n + 30}\n\n" for n in range(12)))
    return {"--data-root": str(root / "data"), "--model": str(root / "model")}


def bed_of(words: list[str]) -> Bed:
    options = text.parse(words)
    return load_bed(Path(options.model), Path(options.data_root), options.tasks)


def words_of(places: dict[str, str], output: Path, *more: str) -> list[str]:
    named = {**places, "--output": str(output), "--steps": "3"}
    return [*(part for pair in named.items() for part in pair), *more]


def run(places: dict[str, str], output: Path, *more: str) -> list[list[str]]:
    """Run the study and return the rows of its table."""
    assert text.main(words_of(places, output, *more)) == 0
    rows: list[list[str]] = json.loads((output / "text.json").read_text())["tables"][0]["rows"]
    return rows


def saved(output: Path, name: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / f"{name}-seed{seed}.json").read_text())
    return found


def test_every_way_gets_its_row_with_the_published_figures(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="one way is a LoRA of PEFT")
    monkeypatch.setitem(text.WAYS, "plain, 3e-5", text.Way(3e-2))
    figure = tmp_path / "points.png"
    rows = run(places, tmp_path, "--figure", str(figure))
    assert [row[0] for row in rows] == ["untouched", *text.WAYS] and figure.stat().st_size > 1000
    assert len(set(rows[1][1:6])) > 2  # figures that differ
    start = saved(tmp_path, "untouched")["pretrained"]
    for row, a in zip(rows, ([start] * 3, saved(tmp_path, "plain-3e-5")["accuracy"]), strict=False):
        ahead = [a[0][1], (a[0][2] + a[1][2]) / 2]
        expected = [
            sum(ahead) / 2,
            sum(map(sum, a)) / 9,
            sum(a[2]) / 3,
            sum(a[i][i] - start[i] for i in range(3)) / 3,
            (a[0][0] - a[2][0] if a[0][0] >= a[1][0] else a[1][0] - a[2][0]) / 2 + (a[1][1] - a[2][1]) / 2,
        ]
        measured = 3 if row[0] == "untouched" else 5
        assert row[1 : 1 + measured] == [f"{value:.1f}" for value in expected[:measured]]
    assert rows[0][4:] == ["-"] * 7 and rows[-1][6:8] == ["-", "-"]  # nothing to go back from; a LoRA
    needs = {row[0]: row[-1] for row in rows}
    assert needs["old pairs, 5 % of the batch"] == "earlier pairs" and needs["distillation"] == "the pool"
    assert needs["ours, Energy(0.99), the default"] == needs["LoRA, r=8"] == "none"
    assert saved(tmp_path, "plain-3e-5")["stored_bytes"] == 0 < saved(tmp_path, "ours-energy-0.8")["stored_bytes"]


def test_recall_is_that_of_one_text_after_another(places: dict[str, str], tmp_path: Path) -> None:
    bed = bed_of(words_of(places, tmp_path))

    @torch.no_grad()
    def alone(tokens: torch.Tensor) -> list[float]:
        states = bed.model(input_ids=tokens[None]).last_hidden_state[0]
        average = [sum(float(state[d]) for state in states) / len(states) for d in range(states.shape[1])]
        length = math.sqrt(sum(value * value for value in average))
        return [value / length for value in average]

    pairs = bed.tasks["trees"]["test"]
    assert len({len(document) for _, document in pairs}) > 4  # batches hold other texts than their neighbours
    plain = [[alone(tokens) for tokens in side] for side in zip(*pairs, strict=True)]
    for side, expected in zip(zip(*pairs, strict=True), plain, strict=True):
        torch.testing.assert_close(embedded(bed.model, side), torch.tensor(expected), rtol=0, atol=0.01)
    products = [[sum(a * b for a, b in zip(query, document)) for document in plain[1]] for query in plain[0]]
    hits = [row.index(max(row)) == number for number, row in enumerate(products)]
    assert recall(bed.model, pairs) == pytest.approx(100 * mean(hits))


def test_a_batch_of_pairs_has_the_symmetric_loss_by_hand(places: dict[str, str], tmp_path: Path) -> None:
    bed = bed_of(words_of(places, tmp_path))
    pairs = bed.tasks["cars"]["training"][:4]
    queries, documents = (embedded(bed.model, side).double() for side in zip(*pairs, strict=True))
    logits = (queries @ documents.T / 0.05).tolist()
    rows = [-row[n] + math.log(sum(map(math.exp, row))) for n, row in enumerate(logits)]
    columns = [-c[n] + math.log(sum(map(math.exp, c))) for n, c in enumerate(zip(*logits, strict=True))]
    assert text.loss_of(bed.model, pairs).item() == pytest.approx(mean(rows + columns), rel=0.01)


def test_a_run_that_was_killed_goes_on_to_the_same_table(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--methods", "5 % of", "--seeds", "0,1")
    whole = run(places, tmp_path / "whole", *asked)
    trained = text.run
    monkeypatch.setattr(text, "run", lambda *given: 1 / 0 if given[-1] == 1 else trained(*given))
    with pytest.raises(ZeroDivisionError):
        run(places, tmp_path / "part", *asked)
    once = saved(tmp_path / "part", "old-pairs-5-of-the-batch")
    monkeypatch.setattr(text, "run", trained)
    resumed = run(places, tmp_path / "part", *asked)
    assert saved(tmp_path / "part", "old-pairs-5-of-the-batch") == once
    assert [row[:8] for row in resumed] == [row[:8] for row in whole]
    monkeypatch.setattr(text, "run", lambda *given: 1 / 0)
    assert run(places, tmp_path / "part", *asked) == resumed


def test_all_the_way_back_is_the_untouched_encoder(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SHARES", (0.0, 1.0))
    monkeypatch.setitem(text.WAYS, "plain, 1e-4", text.Way(1e-2))
    run(places, tmp_path, "--methods", "1e-4")
    found = saved(tmp_path, "plain-1e-4")
    assert found["interpolated"] == {"0.0": found["accuracy"][-1], "1.0": found["pretrained"]}
    assert found["accuracy"][-1] != found["pretrained"]


def test_ours_reads_the_pool_once_and_each_task_but_the_last(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    consolidate = NullSpaceOptimizer.consolidate

    def noted(self: NullSpaceOptimizer, batches: Any, *, name: str, **options: Any) -> Any:
        read.append((name, sum(len(batch["input_ids"]) for batch in batches)))
        return consolidate(self, batches, name=name, **options)

    monkeypatch.setattr(NullSpaceOptimizer, "consolidate", noted)
    run(places, tmp_path, "--methods", "Energy(0.8)", "--tasks", "trees,birds,cars")
    once = [("the pool", 12), ("trees", 16), ("birds", 16)]
    assert read == [*once, *once]  # alone, and beside distillation


def test_validation_is_the_last_fifth_of_train_and_never_trained_on(places: dict[str, str], tmp_path: Path) -> None:
    tasks = bed_of(words_of(places, tmp_path)).tasks
    for number, pairs in enumerate(tasks.values()):
        first = [
            int(query[0]) - 2 - 20 * number for split in ("training", "validation", "test") for query, _ in pairs[split]
        ]
        assert first == list(range(17)) and len(pairs["validation"]) == 2


@pytest.mark.parametrize(
    "option, value, told",
    [
        ("--data-root", "nowhere", "nowhere holds no <task>/train.jsonl or no pool.txt; give the tasks' folder"),
        ("--model", "nowhere", "nowhere cannot be loaded .*; give the folder of a sentence encoder and install both"),
        ("--tasks", "birds,stones", "stones/train.jsonl: expected an object with query and document a line"),
        ("--model", "damaged", "damaged cannot be loaded"),
    ],
)
def test_a_wrong_name_is_told_with_the_way_out(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "bert"}')
    given = value if option == "--tasks" else str(tmp_path / value)
    assert text.main(words_of(places, tmp_path / "output", option, given)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    with pytest.raises(ExperimentError, match=told):
        bed_of(words_of(places, tmp_path / "output", option, given))
    assert given.split(",")[-1] in line


@pytest.mark.parametrize(
    "file, content",
    [("birds/test.jsonl", '{"query": "w1"}\n'), ("cars/train.jsonl", "w1\n"), ("cars/test.jsonl", None)],
)
def test_a_bad_file_is_named(places: dict[str, str], tmp_path: Path, file: str, content: str | None) -> None:
    for path in Path(places["--data-root"]).rglob("*.*"):
        copied = tmp_path / path.relative_to(places["--data-root"])
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(path.read_text())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ExperimentError, match=f"{file}: expected an object with query and document"):
        bed_of(words_of(places, tmp_path, "--data-root", str(tmp_path)))


def test_runs_of_other_settings_are_not_mixed(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(places, tmp_path, "--methods", "3e-5")
    assert text.main(words_of(places, tmp_path, "--steps", "4", "--methods", "3e-5")) == 2
    assert "another value of steps; give another --output" in capsys.readouterr().err
