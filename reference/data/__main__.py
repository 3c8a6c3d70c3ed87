"""Check of the data: `python -m reference.data check --data-root DIR` lists what is found, missing or wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from reference.data.folders import described, train_and_test
from reference.data.images import decode
from reference.data.mtil import read_source
from reference.data.tasks import ORDERS
from reference.errors import ExperimentError


def check(root: str, download: bool, decoded: bool) -> list[tuple[str, str]]:
    """Each task below `root` with what is wrong with it ("" if nothing); `decoded` reads every image.

    Folders `<task>/{train,test}` are checked as a benchmark of one's own, anything else as torchvision's data sets.
    """
    place = Path(root)
    own = sorted(path for path in place.iterdir() if (path / "train").is_dir()) if place.is_dir() else []
    found = []
    for name in [path.name for path in own] or ORDERS["I"]:
        try:
            if own:
                samples = [path for part in train_and_test(place / name) for path, _ in part.samples]
                described(place / name)
            else:
                source = read_source(name, root, download)
                samples = [path for path in (*source.train[0], *source.test[0]) if isinstance(path, str)]
            for path in tqdm(samples if decoded else [], desc=f"decode {name}", leave=False, disable=None):
                decode(path, 32)
            found.append((name, ""))
        except ExperimentError as error:
            found.append((name, str(error)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m reference.data check`: which data sets are there; 1 if one is not."""
    options = parse(arguments)
    rows = check(options.data_root, options.download, options.decode)
    for name, problem in rows:
        print(f"{name:<14} {'found' if not problem else problem.removeprefix(name + ': ')}")
    return int(any(problem for _, problem in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.data", description=main.__doc__)
    parser.add_argument("action", choices=["check"])
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what is missing")
    parser.add_argument("--decode", action="store_true", help="read every image file, to find corrupt ones")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
