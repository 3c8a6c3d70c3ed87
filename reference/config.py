"""Settings of one experiment: a frozen dataclass, filled from `configs/<preset>.yaml` and `key=value` overrides."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from reference.errors import ExperimentError

CONFIGS = Path(__file__).parent / "configs"
WHOLE = (
    "iterations", "batch_size", "reference_images", "evaluation_images", "consolidation_images", "reference_batch",
    "replay_bytes", "lora_rank", "moe_experts", "robust_images", "shots",
)  # fmt: skip
INTERVALS = {
    **dict.fromkeys(("label_smoothing", "energy", "gnsp_rho", "wise_share", "matched_share"), (0.0, 1.0)),
    **dict.fromkeys(("ensemble_share", "prune_bound"), (0.0, 1.0)),
    **dict.fromkeys(("gap_bound", "weight_decay", "warmup", "zscl_l2", "ewc_weight"), (0.0, float("inf"))),
    **dict.fromkeys(("distillation_weight", "alignment_weight", "sgp_alpha"), (0.0, float("inf"))),
    **dict.fromkeys(("learning_rate", "refine_rate"), (0.0, 10.0)),
    "refine_steps": (0, float("inf")),
    "dense_collages": (3, float("inf")),
    "temperature": (1e-3, 1e3),
}
FOLDERS = ("data_root", "model", "reference_root")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; written into its results file.

    Attributes:
        preset: `demo` (everything embedded), `mini` (folders of images and a CLIP given by path) or `paper`.
        source: `folders` (one `ImageFolder` per task), `torchvision` (MTIL's data sets as torchvision keeps them) or
            `stand-in` (noise with the shapes and numbers of classes of MTIL: for memory and speed, not accuracy).
        data_root: folder with one `ImageFolder` per task: `<task>/{train,test}/<class name>/*.jpg`.
        model: a folder written by open_clip's hub format, or `<architecture>:<pretrained tag>`; the tag `random` gives
            untrained weights.
        reference_root: folder with `captions.csv` (columns file, caption); needed by `nullspace-reference`.
        output: folder of the results. order: task order, `I` or `II`, of the MTIL benchmark (ZSCL, 2023).
        tasks: names of the tasks to use, in this order; empty: all tasks of `order`.
        methods, seeds: each method is run once per seed.
        split: `test` trains on all training images; `validation` holds the last fifth of each class's training
            images back and evaluates on them. Settings are chosen on `validation` alone.
        iterations, batch_size, learning_rate, weight_decay, warmup, label_smoothing: the training of one task,
            AdamW with `warmup` linear steps, then cosine to zero.
        precision: autocast type of forward passes; parameters stay float32.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the rest again; less
            memory, about a third more time, the same gradients.
        device: `auto`, `cpu`, `cuda` ...
        evaluation_images: most images of one task that are scored (a fixed draw); `null`: all.
        evaluation_templates: class vectors from the `first` prompt template, from the mean of `all`, or `gnsp`: the
            first for tasks trained before the latest one, all for the others.
        also_templates: further rules of the same kind whose scores are stored beside the accuracy matrix.
        consolidation_images: most images of one task that are consolidated; `null`: all.
        shots: most training images of a class, drawn anew for each seed; `null`: all.
        robust_images: test images of each task that are attacked before and after the sequence; `null`: none, since it
            takes as long as training a task.
        dense_collages: collages of test images on which patches are looked at at both ends as well; `null`: none.
        reference_images: how many images of the reference pool `nullspace-reference` protects.
        layers: what methods without adapters train, and so protect: `all` (both towers), `vision` (the image tower),
            `gnsp` (the MLPs of the image tower and its projection, 25 tensors in ViT-B/16) or `pooling` (its attention
            pooling; of a transformer the last block's attention and the projection).
        energy: share of a task's input energy that is protected. sgp_alpha: directions are kept by their importance
            with SGP's alpha (soft protection); `null`: fully.
        prune_bound: after each task, protected directions are given back as long as no task so far loses more than
            this share of its energy (their images are read again); 0: never.
        refine_steps, refine_rate, refine_loss: CLIP-Refine's phase on the reference pool before any method; its control
            `norm` in place of `random`. Scores before training are then those of the refined model. 0 steps: none.
        pool_losses: GNSP's two losses on the reference pool beside our methods as well.
        project: `update` (weights corrected after the step) or `both` (gradients projected as well), for our methods.
        reference_batch: images of the pool beside each training batch, for methods with losses on it; `null`: as many
            as `batch_size`.
        temperature, distillation_weight, alignment_weight: of the losses on the pool (GNSP: 2, 1 and 0.75); the second
            also of `orthsr`'s on the task's own images.
        schedule: `uniform`, or `gnsp`: rates and iterations in GNSP's proportions by task and order, for its family.
        gnsp_rho: share of the energy that GNSP leaves unprotected.
        gnsp_gram: Gram matrices normalised by batch and by task (`batch-frobenius`, as released) or summed (`count`).
        gnsp_first_task: `full` trains both towers without projection (as released), `restricted` only the tensors that
            are trained later, `reference` the same, with the pool's Gram matrices protected.
        zscl_l2, ensemble_share: ZSCL's pull towards the weights at the task's start; time between averaged weights as
            a share of the task's steps (100 of 1,000 in the paper).
        wise_share: share of the fine-tuned weights in WiSE-FT's mean. matched_share: share of `learning_rate` at which
            `matched-plasticity` trains. replay_bytes: size of `replay`'s buffer. ewc_weight: strength of EWC's penalty.
        pretrain_iterations, pretrain_rate: of demo's own tiny CLIP. igsp: options of `nullspace_optim.IGSP`.
        lora_rank: rank of the methods with LoRA. moe_experts: experts beside each block of `moe-adapters`.
        gap_bound: how far `mg-clip` lets the mean cosine of images with wrong classes move (a tenth of mini-clip's).
        of_method: settings that differ for one method, by its name; the rate of each method, say. What is given is
            put over the preset's; `{}` takes the preset's away.
        note: sentence printed under the table.
    """

    preset: str
    output: str
    data_root: str = ""
    model: str = ""
    reference_root: str = ""
    source: Literal["folders", "torchvision", "stand-in"] = "folders"
    order: Literal["I", "II"] = "I"
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("finetune", "gradient", "nullspace")
    seeds: tuple[int, ...] = (0,)
    split: Literal["test", "validation"] = "test"
    iterations: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 10
    label_smoothing: float = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device: str = "auto"
    evaluation_images: int | None = None
    evaluation_templates: Literal["first", "all", "gnsp"] = "first"
    also_templates: tuple[Literal["first", "all", "gnsp"], ...] = ()
    robust_images: int | None = None
    dense_collages: int | None = None
    consolidation_images: int | None = None
    shots: int | None = None
    reference_images: int = 1000
    layers: Literal["all", "vision", "gnsp", "pooling"] = "all"
    energy: float = 0.999
    sgp_alpha: float | None = None
    prune_bound: float = 0.0
    refine_steps: int = 0
    refine_rate: float = 1e-6
    refine_loss: Literal["random", "norm"] = "random"
    pool_losses: bool = False
    project: Literal["update", "both"] = "both"
    reference_batch: int | None = None
    temperature: float = 2.0
    distillation_weight: float = 1.0
    alignment_weight: float = 0.75
    schedule: Literal["uniform", "gnsp"] = "uniform"
    gnsp_rho: float = 0.15
    gnsp_gram: Literal["batch-frobenius", "count"] = "batch-frobenius"
    gnsp_first_task: Literal["full", "restricted", "reference"] = "full"
    zscl_l2: float = 1.0
    ensemble_share: float = 0.1
    wise_share: float = 0.5
    matched_share: float = 0.1
    replay_bytes: int = 2**25
    ewc_weight: float = 1000.0
    pretrain_iterations: int = 0
    pretrain_rate: float = 0.0
    igsp: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = 8
    gap_bound: float = 0.04
    moe_experts: int = 22
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        """Check every number against its interval, and that the presets have what they need.

        Raises:
            ExperimentError: naming the setting, what was found and what is allowed.
        """
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExperimentError(f"{name}={value} must be at least 1")
        for name, (low, high) in INTERVALS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ExperimentError(f"{name}={getattr(self, name)} must lie between {low} and {high}")
        if not self.methods or not self.seeds:
            raise ExperimentError("methods and seeds must name at least one method and one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ExperimentError(f"seeds={','.join(map(str, self.seeds))} must differ: each is one run")
        for name in ("model",) if self.source == "stand-in" else ("data_root", "model"):
            if self.preset != "demo" and not getattr(self, name):
                raise ExperimentError(f"preset {self.preset} needs --{name.replace('_', '-')}")


def load_config(preset: str, overrides: Mapping[str, Any]) -> Config:
    """Read `configs/<preset>.yaml` and put `overrides` (values already parsed) over it.

    A setting given there takes the preset's own values of it from every method. `of_method` is put over the preset's
    method by method and setting by setting; an empty one takes all of them away.

    Raises:
        ExperimentError: unknown preset, unknown setting or a value of the wrong kind.
    """
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("templates", "classes", "grids"))
    if preset not in known:
        raise ExperimentError(f"unknown preset {preset!r}: choose one of {', '.join(known)}")
    settings = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8"))
    preset_own, own = (_convert("of_method", None, part.get("of_method", {})) for part in (settings, overrides))
    kept = {m: {key: v for key, v in part.items() if key not in overrides} for m, part in preset_own.items()}
    of_method = {name: {**kept.get(name, {}), **own.get(name, {})} for name in {**kept, **own}}
    of_method = {} if overrides.get("of_method") == {} else of_method
    return Config(**_converted({**settings, **overrides, "of_method": of_method, "preset": preset}))


def for_method(config: Config, name: str) -> Config:
    """The settings under which method `name` runs: `of_method` applied and emptied.

    Raises:
        ExperimentError: an unknown setting, or a value of the wrong kind.
    """
    return replace(config, **_converted(config.of_method.get(name, {})), of_method={})


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `["key=value", ...]` into a dict; values are read as YAML.

    Raises:
        ExperimentError: a pair without `=`, a key given twice, or a value that is not YAML.
    """
    parsed = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ExperimentError(f"--set {pair}: expected key=value")
        if key.strip() in parsed:
            raise ExperimentError(f"--set {pair}: {key.strip()} is given twice; give it once")
        try:
            parsed[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ExperimentError(f"--set {pair}: the value is not valid YAML") from error
    return parsed


def recorded(config: Config) -> dict[str, Any]:
    """All settings as results keep them: folders by their last name only, since a path belongs to one machine."""
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "output"}
    return {name: Path(value).name if name in FOLDERS else value for name, value in settings.items()}


def identity(config: Config, reference: bool = True) -> dict[str, Any]:
    """The settings that decide about the numbers of a run (not who else is run; the pool only if `reference`)."""
    left_out = {"methods", "seeds", "note"} | (set() if reference else {"reference_root", "reference_images"})
    return {name: value for name, value in recorded(config).items() if name not in left_out}


def refuse_other_settings(saved: Mapping[str, Any], config: Config, reference: bool, folder: Path) -> None:
    """Refuse to go on with what was made in `folder` with other settings than `config`, of a method with a pool or not.

    Settings that are newer than `saved` count as their defaults.

    Raises:
        ExperimentError: naming the first setting that differs.
    """
    defaults = recorded(Config(config.preset, output="", data_root="any", model="any"))
    wanted = identity(config, reference or config.pool_losses)
    wanted, defaults = (json.loads(json.dumps(part)) for part in (wanted, defaults))
    for key, value in wanted.items():
        found = saved.get(key, defaults[key])
        if found != value:
            raise ExperimentError(
                f"{folder} was made with {key}={found!r}, this run has {value!r}; "
                "resume with the same settings or choose another --output"
            )


def _converted(settings: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(Config)
    for key in settings:
        if key not in hints:
            near = get_close_matches(key, hints, n=1)
            advice = f"did you mean {near[0]!r}?" if near else "known settings: " + ", ".join(hints)
            raise ExperimentError(f"unknown setting {key!r}: {advice}")
    return {key: _convert(key, hints[key], value) for key, value in settings.items()}


def _convert(key: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint` of the field `key`; `1e-4`, which YAML leaves a string, becomes a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(key, arguments[0], value)
    if key == "of_method":
        if not isinstance(value, Mapping) or not all(isinstance(inner, Mapping) for inner in value.values()):
            raise ExperimentError(f"of_method={value!r} must map names of methods to settings")
        return {str(name): _converted(inner) for name, inner in value.items()}
    if key == "igsp":
        if not isinstance(value, Mapping):
            raise ExperimentError(f"igsp={value!r} must map names of options to values")
        return {str(name): _number(option) for name, option in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ExperimentError(f"{key}={value!r} must be one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(key, arguments[0], item) for item in items)
    try:
        if value is None or isinstance(value, bool) != (hint is bool) or (hint is int and int(value) != float(value)):
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise ExperimentError(f"{key}={value!r} must be of type {hint.__name__}") from None


def _number(value: Any) -> Any:
    """`value`, or the number that it spells: YAML leaves `1e-4` a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
