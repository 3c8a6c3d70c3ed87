"""Mode "igsp" on replicas and shards: phases advance together, and results are those of one process."""

from __future__ import annotations

from pathlib import Path

import igsp_scenarios
import pytest
import torch
from igsp_scenarios import REPLICAS, SHARDS, Tower, check, results, resume, train, wrap
from models import seeded
from processes import SHARDS_NEEDED, SHARDS_ON_CPU, run_scenarios

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
needs_shards = pytest.mark.skipif(not SHARDS_ON_CPU, reason=SHARDS_NEEDED)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write down what one process finds, then run all scenarios in two, and one in four."""
    folder = tmp_path_factory.mktemp("igsp")
    igsp_scenarios.one_process(folder)
    two = run_scenarios([*REPLICAS, *(SHARDS if SHARDS_ON_CPU else ())], folder)
    four = run_scenarios([igsp_scenarios.four_go_on], folder, ranks=4)
    return {**two, **four, "folder": str(folder)}


@pytest.mark.parametrize(
    "name",
    [
        *(scenario.__name__ for scenario in (*REPLICAS, igsp_scenarios.four_go_on)),
        *(pytest.param(scenario.__name__, marks=needs_shards) for scenario in SHARDS),
    ],
)
def test_several_processes(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "passed", outcomes[name]


@pytest.mark.parametrize(
    "count", ["two", "two-dcp", *(pytest.param(kind, marks=needs_shards) for kind in ("shards", "shards-dcp"))]
)
def test_one_process_goes_on_where_several_stopped(count: str, outcomes: dict[str, str]) -> None:
    folder = Path(outcomes["folder"])
    model = seeded(Tower)
    opt = wrap(model)
    resume(opt, folder, count)
    train(model, opt, 2, "default", 10)
    check(results(opt), torch.load(folder / "igsp-resumed.pt"))


@pytest.mark.parametrize("count", ["one", "two", pytest.param("shards", marks=needs_shards)])
def test_a_file_deploys_whatever_wrote_it(count: str, outcomes: dict[str, str]) -> None:
    folder = Path(outcomes["folder"])
    opts = [wrap(seeded(Tower)) for _ in range(2)]
    opts[0].load(folder / "one.safetensors")
    opts[1].load(folder / f"{count}.safetensors")
    assert opts[1].status().finished == ("t1",)
    check(results(opts[1]), results(opts[0]))
