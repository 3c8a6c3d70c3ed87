"""Tasks, pretrained model and reference pool of one experiment, checked before any training starts.

Folders of images are decoded and kept in memory. torchvision's data sets are counted; `python -m reference.data check
--decode` reads every file of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reference.config import Config
from reference.data import demo, folders, stand_in
from reference.data.folders import ReferencePool
from reference.data.tasks import Task
from reference.methods import chosen_methods, refuse_unknown
from reference.training.clip import Clip, load_clip
from reference.training.demo_clip import pretrained_clip


@dataclass(frozen=True)
class Experiment:
    """Parts that all methods and seeds share; `pretrained(seed)` is the model that each run copies."""

    tasks: list[Task]
    pool: ReferencePool | None
    pretrained: Callable[[int], Clip]


def prepare(config: Config) -> Experiment:
    """Load, render or check everything that the run will need.

    Raises:
        ExperimentError: anything missing or unreadable, named with the way out.
    """
    refuse_unknown(config.of_method)
    pooled = any(method.needs_reference for method in chosen_methods(config.methods))
    wanted = pooled or config.pool_losses or config.refine_steps
    if config.preset == "demo":
        pretraining = demo.pretraining_task()
        rendered = demo.reference_pool(pretraining, config.reference_images)
        return Experiment(demo.tasks(config), rendered, lambda seed: pretrained_clip(config, pretraining, seed))
    clip = load_clip(config)
    if config.source == "stand-in":
        pool = stand_in.stand_in_pool(config.reference_images, clip.size)
        return Experiment(folders.load_sources(config, clip.size, stand_in.stand_in), pool, lambda seed: clip)
    pool = folders.load_reference_pool(config, clip.size) if wanted or config.reference_root else None
    load = folders.load_sources if config.source == "torchvision" else folders.load_tasks
    return Experiment(load(config, clip.size), pool, lambda seed: clip)
