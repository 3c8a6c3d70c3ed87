"""The optimizers of the installed libraries and how each of them is built and stepped."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

How = Literal["plain", "closure", "own closure", "own backward", "loss", "second order"]
Takes = Literal[
    "parameters", "model", "matrices", "muon groups", "optimizer", "galore groups", "model first", "surrogate gap"
]
LIBRARIES = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
    "torchao": "torchao.optim",
    "timm": "timm.optim",
    "bitsandbytes": "bitsandbytes.optim",
    "galore_torch": "galore_torch",
}
QUANTIZED = {"torchao": 64, "bitsandbytes": 64}  # states of fewer than 4096 entries stay in float32


@dataclass(frozen=True)
class Candidate:
    """One optimizer: `build(model)` makes it, `how` says what its step wants."""

    library: str
    name: str
    build: Callable[[nn.Module], Optimizer]
    how: How = "plain"
    note: str = ""
    width: int = 32


@dataclass(frozen=True)
class Recipe:
    """How a class differs from `Class(model.parameters())`."""

    options: Mapping[str, Any] = field(default_factory=dict)
    takes: Takes = "parameters"
    how: How = "plain"
    note: str = ""
    width: int = 32

    def build(self, kind: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
        """Call the class; a class without a default rate gets 1e-3."""
        first: tuple[Any, ...] = {
            "parameters": lambda: (list(model.parameters()),),
            "model": lambda: (model,),
            "matrices": lambda: ([p for p in model.parameters() if p.ndim == 2],),
            "muon groups": lambda: (_split(model, use_muon=True),),
            "galore groups": lambda: (_split(model, rank=8, update_proj_gap=5, scale=0.25, proj_type="std"),),
            "optimizer": lambda: (AdamW(model.parameters(), lr=1e-3),),
            "model first": lambda: (model, list(model.parameters())),
            "surrogate gap": lambda: (list(model.parameters()), SGD(model.parameters(), lr=1e-3), model, _Constant()),
        }[self.takes]()
        try:
            return kind(*first, **self.options)
        except TypeError as error:
            if "lr" in self.options or "'lr'" not in str(error):
                raise
            return kind(*first, lr=1e-3, **self.options)


class _Constant:
    """What GSAM asks for its perturbation radius."""

    def step(self) -> float:
        return 0.05


def _split(model: nn.Module, **marks: Any) -> list[dict[str, Any]]:
    """Matrices in one group with `marks`, the rest in another."""
    rest: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim < 2]}
    if "use_muon" in marks:
        rest["use_muon"] = False
    return [{"params": [p for p in model.parameters() if p.ndim == 2], **marks}, rest]


SHARPNESS = "through step(closure), or first_step and second_step called by hand"
_SMALL = {"lr": 1e-3}
_HEAVY = {"lr": 1e-3, "momentum": 0.9}
_STEADY = {"lr": 0.1, "max_iter": 2}  # with its defaults it is done before the consolidation
_ADAPT = Recipe({"growth_rate": 1.02}, note="growth_rate=1.02: its default lets the weights grow a hundredfold here")
RUNS_AWAY = (
    "after some 200 steps its estimate of the step runs away and training diverges; "
    'with project="both" it holds (500 steps)'
)
RECIPES: dict[tuple[str, str], Recipe] = {
    ("torch", "LBFGS"): Recipe(_STEADY, how="closure"),
    ("torch", "SparseAdam"): Recipe(note="wants sparse gradients: see tests/contract"),
    ("torch", "Muon"): Recipe(takes="matrices"),
    ("torch", "SGD"): Recipe(_SMALL),
    **{("pytorch_optimizer", n): Recipe(takes="muon groups") for n in ("Muon", "AdaMuon", "AdaGO", "DistributedMuon")},
    **{("pytorch_optimizer", n): Recipe(takes="muon groups") for n in ("MuonClip", "NorMuon")},
    **{("pytorch_optimizer", n): Recipe(takes="model") for n in ("AdamMini", "LOMO", "AdaLOMO")},
    **{
        ("pytorch_optimizer", n): Recipe({"base_optimizer": SGD, **_SMALL}, how="closure", note=SHARPNESS)
        for n in ("SAM", "LookSAM", "FriendlySAM")
    },
    ("pytorch_optimizer", "WSAM"): Recipe({"base_optimizer": SGD, **_SMALL}, "model first", "closure", SHARPNESS),
    ("pytorch_optimizer", "GSAM"): Recipe(takes="surrogate gap", how="own closure"),
    ("pytorch_optimizer", "LoRARite"): Recipe(takes="matrices"),
    ("pytorch_optimizer", "SafeFP16Optimizer"): Recipe(takes="optimizer", how="own backward"),
    **{
        ("pytorch_optimizer", n): Recipe(takes="optimizer")
        for n in ("Lookahead", "TRAC", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper")
    },
    **{("pytorch_optimizer", n): _ADAPT for n in ("DAdaptAdam", "DAdaptAdan")},
    **{("pytorch_optimizer", n): Recipe(how="second order") for n in ("AdaHessian", "SophiaH")},
    **{(library, "Kron"): Recipe(width=16) for library in ("pytorch_optimizer", "timm")},
    ("pytorch_optimizer", "DAdaptLion"): Recipe(note=RUNS_AWAY),
    ("pytorch_optimizer", "AliG"): Recipe(how="loss"),
    ("pytorch_optimizer", "BSAM"): Recipe({"num_data": 32}, how="closure"),
    ("pytorch_optimizer", "LBFGS"): Recipe(_STEADY, how="closure"),
    ("pytorch_optimizer", "Ranger21"): Recipe({"num_iterations": 1000}),
    ("pytorch_optimizer", "SpectralSphere"): Recipe(takes="matrices", width=16),
    **{
        ("schedulefree", f"{n}ScheduleFreeClosure"): Recipe(_SMALL if n == "SGD" else {}, how="closure")
        for n in ("AdamW", "SGD", "RAdam")
    },
    ("timm", "Lookahead"): Recipe(takes="optimizer"),
    ("timm", "Adahessian"): Recipe(how="second order"),
    ("timm", "SGDP"): Recipe(_SMALL),
    **{("bitsandbytes", n + bits): Recipe(_HEAVY) for n in ("SGD", "LARS") for bits in ("", "8bit", "32bit")},
    ("bitsandbytes", "PytorchLARS"): Recipe(_HEAVY),
    ("galore_torch", "GaLoreAdafactor"): Recipe({"lr": None}, takes="galore groups"),
    ("galore_torch", "GaLoreAdamW"): Recipe(takes="galore groups"),
    ("galore_torch", "GaLoreAdamW8bit"): Recipe(takes="galore groups"),
}


def candidates(libraries: Sequence[str]) -> Iterator[Candidate]:
    """Yield every public optimizer class of the installed ones among `libraries`."""
    for library in libraries:
        try:
            module = importlib.import_module(LIBRARIES.get(library, library))
        except ImportError:
            continue
        seen = set()
        for name, kind in sorted(vars(module).items()):
            if _is_optimizer(kind) and not name.startswith("_") and kind not in seen:
                seen.add(kind)
                recipe = RECIPES.get((library, name), Recipe())
                yield Candidate(
                    library,
                    name,
                    partial(recipe.build, kind),
                    recipe.how,
                    recipe.note,
                    max(recipe.width, QUANTIZED.get(library, 0)),
                )


def _is_optimizer(kind: Any) -> bool:
    return (
        inspect.isclass(kind)
        and kind is not Optimizer
        and (issubclass(kind, Optimizer) or (callable(getattr(kind, "zero_grad", None)) and hasattr(kind, "step")))
    )
