"""`NullSpacePlugin` for axolotl: `NullSpaceCallback` from four lines of YAML.

plugins: [nullspace_optim.integrations.axolotl.NullSpacePlugin]
nullspace:
  pool: pool.jsonl
  policy: Energy(0.5)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..policies.parse import parse_policy
from .transformers import NullSpaceCallback

if TYPE_CHECKING:
    BasePlugin = object
    BaseModel = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
        from pydantic import BaseModel
    except ImportError as error:
        raise ImportError("this plugin needs axolotl: pip install axolotl") from error

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class NullSpaceConfig(BaseModel):
    """Keys under ``nullspace:``, the arguments of `NullSpaceCallback`.

    `pool` is a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.txt``) or folder (`save_to_disk`) of texts,
    chats or tokens, a name on the Hub, or a mapping of arguments of `datasets.load_dataset`. `path` is
    ``bases.safetensors`` in `output_dir` by default.
    """

    model_config = {"extra": "forbid"}

    pool: str | dict[str, Any] | None = None
    after: bool = True
    policy: str | None = None
    project: str | None = None
    bases: str | None = None
    path: str | None = None
    max_batches: int | None = None


class NullSpaceArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    nullspace: NullSpaceConfig | None = None


class NullSpacePlugin(BasePlugin):
    """Give axolotl's trainer a `NullSpaceCallback`.

    Raises:
        ImportError: axolotl is not installed (on import).
    """

    def get_input_args(self) -> str:
        """Return the name of the configuration's class."""
        return f"{__name__}.NullSpaceArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback for the trainer that axolotl is about to make.

        Raises:
            OptionError: there is no ``nullspace:`` in the configuration, or its pool is not there.
        """
        if not cfg.get("nullspace"):
            raise OptionError("plugins: names NullSpacePlugin, but nothing says what to keep: nullspace: {pool: ...}")
        settings: Any = NullSpaceConfig
        given = settings(**{key: value for key, value in dict(cfg["nullspace"]).items() if value is not None})
        options: dict[str, Any] = {} if given.project is None else {"project": given.project}
        if given.policy is not None:
            options["policy"] = parse_policy(given.policy, "nullspace: policy:")
        return [
            NullSpaceCallback(
                None if given.pool is None else _read(given.pool),
                given.after,
                bases=given.bases,
                path=given.path or os.path.join(cfg["output_dir"], "bases.safetensors"),
                max_batches=given.max_batches,
                **options,
            )
        ]


def _read(pool: Any) -> Any:
    """Return the data set of a pool."""
    import datasets

    if not isinstance(pool, str):
        return datasets.load_dataset(**{"split": "train", **pool})
    if Path(pool).is_dir():
        return datasets.load_from_disk(pool)
    builder = BUILDERS.get(Path(pool).suffix)
    if builder is None:
        return datasets.load_dataset(pool, split="train")
    if not Path(pool).is_file():
        raise OptionError(f"nullspace: pool: {pool}: there is no such file")
    return datasets.load_dataset(builder, data_files=pool, split="train")
