"""The faults that users of protection run into, by number, and the behaviour they may expect of this library.

A test that proves the behaviour carries `@pytest.mark.fault(number)`; `table.py` puts both together. An entry of
`EXCUSED` says why a fault has no test.
"""

# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """What goes wrong, and what happens then."""

    what: str
    behaviour: str


STEPS = {
    1: Fault("NaN or Inf in one gradient", "the base decides as without us; other rows and parameters stay as they should; consolidate and save name the parameter"),
    2: Fault("all gradients are None", "no-op, no state is created, no gradient invented"),
    3: Fault("a protected parameter without gradient", "bitwise untouched if the base leaves it; corrected if the base moves it all the same"),
    4: Fault("zero gradients at learning rate 0", "bitwise no-op, counters unchanged"),
    5: Fault("GradScaler skips a step", "nothing happens; the next step is right"),
    6: Fault("fused base under GradScaler", "gradients are unscaled once; kept directions hold"),
    7: Fault("`scaler.unscale_` before the step, `scaler.step(base)`", "protected both ways; unscaling one and stepping the other counts as two optimizers for torch, and is protected"),
    8: Fault("gradient accumulation", "equals one big batch"),
    9: Fault("clipping before the step", "kept directions hold; the norm is the user's own"),
    10: Fault("closures (SGD, LBFGS with line search)", "the loss is returned, calls are as many as the base's, kept directions hold"),
    11: Fault("a closure raises", "the exception passes; hooks and gradients are intact"),
    12: Fault("sparse gradients", "used embedding rows stay bitwise, others train; projecting the gradient itself is refused by name"),
    13: Fault("complex parameters", "the adjoint is used throughout; kept directions hold"),
    14: Fault("float16 or bfloat16 parameters", "corrected in float32, rounded once; the report states the drift to expect and the way out"),
    15: Fault("channels-last kernels", "memory format kept, same result"),
    16: Fault("non-contiguous or expanded parameters", "strides kept, same result; an expanded parameter is refused by name"),
    17: Fault("vectors: biases, norm weights", "frozen, trained or joint with their weight, as the option says"),
    18: Fault("grouped, depthwise, dilated, transposed convolutions", "each group has its own input side, against a dense oracle"),
    19: Fault("parameters of size zero, scalars", "ignored"),
    20: Fault("`maximize=True`", "unaffected"),
    21: Fault("a differentiable base", "refused with the reason"),
    22: Fault("learning rate as tensor, scheduler built before wrapping", "works"),
    23: Fault("weights edited on purpose", "found, named, `reanchor()` offered; never reverted in silence"),
}  # fmt: skip
PARAMETERS = {
    24: Fault("a parameter is frozen and unfrozen", "its basis stays; protection goes on"),
    25: Fault("a parameter is added later", "free until the next consolidation, and reported so"),
    26: Fault("a layer is replaced by one of another shape", "error with the name and both shapes; a replacement of the same shape is held to the same anchors"),
    27: Fault("renamed parameters", "prefixes of wrappers are stripped; otherwise missing and unexpected names are listed"),
    28: Fault("tied weights", "one name, both constraints hold"),
    29: Fault("one module called twice in a forward", "rows of both calls count"),
    30: Fault("a parameter in two groups, bases or wrappers", "two groups: torch refuses; two bases: refused; two wrappers: the second takes the bases over, the first refuses"),
    31: Fault("one module under two names", "one entry"),
    32: Fault("the base holds tensors that are not in the model", "listed once in the report, trained as before"),
    33: Fault("parameters of the model that the optimizer lacks", "listed; a warning when they begin to train"),
    34: Fault("deepcopy, pickle, spawn", "the copy is protected, independent, bitwise the same"),
    35: Fault("a wrapper in a wrapper", "refused with the reason"),
    36: Fault("a framework wraps or subclasses the optimizer", "methods reach the one store behind it; protection holds"),
    37: Fault("a base without state or defaults, or with host copies", "refused with the reason"),
    38: Fault("parameter objects are swapped", "found again by name, held to the same anchors; an error if the shape differs"),
    39: Fault("meta device at construction", "construction works; consolidating before the weights exist names one of them"),
    40: Fault("parameters on several devices", "each basis lives with its parameter"),
    41: Fault("quantised layers", "not trainable, noted; adapters on them are protected"),
    42: Fault("LoRA adapters", "both factors are layers of their own; merging them is an edit (23)"),
}  # fmt: skip
DATA = {
    43: Fault("an empty loader", "an error; no empty task is added"),
    44: Fault("the loader raises midway", "the same exception; model, optimizer, bases, hooks, flags, random state as before"),
    45: Fault("Ctrl-C midway", "as 44"),
    46: Fault("NaN or Inf in activations", "an error names the parameter and the batch; nothing changed"),
    47: Fault("a dead layer: all activations zero", "rank 0, no division by zero"),
    48: Fault("fewer rows than directions", "the rank is at most the number of rows; few rows for a direction are noted in the report"),
    49: Fault("float16 activations whose squares overflow", "summed in float32: finite"),
    50: Fault("loaders without length, or without end", "work with `max_batches`; without it an endless one is stopped and refused"),
    51: Fault("batches of any type", "tensor, tuple, list, mapping, named tuple, dataclass, nested; otherwise the type is named and `forward=` asked for"),
    52: Fault("labels in the batch", "the model gets as many leading items as its forward requires"),
    53: Fault("a small last batch, a batch of no samples", "weighted by rows; empty ones add nothing"),
    54: Fault("padding", "rows that cannot reach the output do not count"),
    55: Fault("integer images, another device", "moved to the parameters' device, type untouched"),
    56: Fault("a worker process dies", "its exception passes; nothing changed"),
    57: Fault("shuffled or augmented data", "allowed; the order changes nothing; `verify` says when it cannot find its samples"),
    58: Fault("one task consolidated twice", "the same name is refused; the same data add nothing"),
    59: Fault("consolidation before any step, or twice in a row", "works"),
    60: Fault("out of memory while sums are made", "an error names the parameter, the bytes and the way out; nothing changed"),
}  # fmt: skip
MODEL = {
    61: Fault("dropout, train mode", "measured in evaluation mode; every flag restored"),
    62: Fault("BatchNorm", "statistics bitwise as before"),
    63: Fault("a BatchNorm frozen by the user", "still in evaluation mode afterwards"),
    64: Fault("random state", "Python, NumPy, torch and the loader's generator as before"),
    65: Fault("compiled models", "measured eagerly; not compiled again afterwards"),
    66: Fault("activation checkpointing", "each row counts once"),
    67: Fault("autocast around the call", "same statistics up to the rounding of the inputs"),
    68: Fault("attention with fast path", "captured; the fast path restored"),
    69: Fault("functional use, bare parameters, TorchScript", "captured, or named with the operator that read them"),
    70: Fault("layers called by keyword or with several inputs", "captured"),
    71: Fault("a layer that the loader does not reach", "listed as free, or keeps its basis"),
    72: Fault("the user's hooks, also such as remove themselves", "order and presence unchanged"),
    73: Fault("a forward with side effects", "documented; `forward=` avoids them"),
    74: Fault("the forward raises", "as 44, the batch is named"),
    75: Fault("inference tensors", "captured; nothing of them leaks into training"),
    76: Fault("under `no_grad`, with gradients pending", "gradients and grad mode untouched"),
}  # fmt: skip
NUMERICS = {
    77: Fault("no free direction left", "a warning at 90 %; at 100 % frozen and named, or an error if asked for"),
    78: Fault("eigenvalue solver fails or returns NaN", "double precision, CPU, jitter; then an error with the name"),
    79: Fault("negative eigenvalues", "clamped within rounding, otherwise refused"),
    80: Fault("ties at the cut", "the first key and position win, always"),
    81: Fault("bases joined over many tasks", "orthonormal to 1e-6 after 50 tasks"),
    82: Fault("bases cast to half precision", "refused by name"),
    83: Fault("thresholds out of range", "refused at construction with the interval"),
    84: Fault("TF32, autocast, deterministic algorithms", "corrections run in full precision; deterministic mode works"),
}  # fmt: skip
FILES = {
    85: Fault("killed while saving", "the old or the new file, whole; leftovers are swept later"),
    86: Fault("disk full, quota, read-only folder", "`OSError` with the path; the old file intact, no temporary left"),
    87: Fault("truncated, extended, empty, text, pickle, HTML", "one error: path and reason"),
    88: Fault("a flipped bit", "the digest names the tensor"),
    89: Fault("duplicate, missing, extra entries", "refused, all listed"),
    90: Fault("a safetensors file of something else", "refused by its metadata"),
    91: Fault("a newer or older schema", "newer: the version needed is named; older: read"),
    92: Fault("NaN or a basis that is not orthonormal", "refused by name"),
    93: Fault("shapes that do not fit", "refused with both shapes"),
    94: Fault("paths or control characters in names", "names are data, printed escaped"),
    95: Fault("a malicious pickle", "never unpickled"),
    96: Fault("giant header, a million tensors, overflowing shapes", "refused at once, in little memory"),
    97: Fault("saving over the file just loaded", "both stay valid"),
    98: Fault("file mode", "as `open` gives under the umask; an existing mode is kept"),
    99: Fault("two processes save to one path; a symbolic link", "the last complete file wins; the link is followed"),
    100: Fault("a checkpoint resumed without its bases", "an error; never unprotected in silence"),
    101: Fault("a protected checkpoint in the bare base, and back", "both work, with a message"),
    102: Fault("the same bases saved twice", "the same bytes"),
}  # fmt: skip
PROCESSES = {
    103: Fault("ranks see different numbers of batches", "sums are reduced once at the end; no hang"),
    104: Fault("one rank's loader raises", "all ranks raise"),
    105: Fault("ranks disagree on names, shapes or options", "the first difference is named"),
    106: Fault("bases differ by rounding between ranks", "they cannot: computed once or verified equal"),
    107: Fault("save on all ranks", "one writes, the others wait"),
    108: Fault("resume on another world size", "same result"),
    109: Fault("uneven and empty shards", "the local correction takes zero rows"),
    110: Fault("flattened parameters: FSDP1, ZeRO", "refused with the way out"),
}  # fmt: skip
AROUND = {
    111: Fault("the router never converges", "stops at the stated limit, reports, keeps all experts"),
    112: Fault("pruning would remove the last expert or exceed the bound", "refused, the bound stated"),
    113: Fault("an expert of wrong rank or layer", "the layer is named"),
    114: Fault("the teacher is the student", "refused"),
    115: Fault("logit scale overflows, features of norm zero, one class", "a finite loss, or an error naming the input"),
    116: Fault("a teacher in train mode or with gradients", "its outputs are constants: the teacher gets no gradient"),
    117: Fault("command line: missing file, no arguments, closed pipe, no matplotlib", "one line and an exit code each; a closed pipe is quiet"),
    118: Fault("missing data set, corrupt image, wrong classes", "task and file are named before training starts"),
    119: Fault("an experiment is interrupted and resumed", "same accuracy matrix and weights, bitwise on the CPU"),
    120: Fault("metrics with missing cells", "shown as \"-\"; averages say how many cells"),
}  # fmt: skip
GROWTH = {
    121: Fault("a weight grows: a class-incremental head, a token table, more channels, features or groups", "what was there stays kept, what is new is free until the next consolidation, which keeps all of it; one line says so"),
    122: Fault("a weight that has grown with other values in front, or has shrunk", "refused with the name and both shapes until the name is released"),
    123: Fault("bases of a smaller weight in a file, a state dict, the command line", "they load where the weight begins with what is kept, else refused"),
    124: Fault("a new wrapper, or a copy, after a weight has grown", "the bases go over; a copy is protected on its own"),
    125: Fault("a module replaced in the model, the optimizer holds the old one", "named once at `consolidate`, `save` and `state_dict`; `verify()` does not hold"),
    126: Fault("a null-space wrapper over a model with the experts of a living one", "refused; allowed once that one is detached or gone"),
    127: Fault("a first axis that is none of samples: graphs, time steps, crops, packed sequences", "consolidated; the probe is the whole first batch, with one note"),
}  # fmt: skip
LOOPS = {
    128: Fault("an interrupt, an error or no memory anywhere inside a step", "the next use of the weights goes on from the anchors; hidden gradients are back"),
    129: Fault("SAM, Lookahead, extragradient written by hand around `step`", "kept directions stay; what is not taken back is refused with both ways out"),
    130: Fault("an edit by mistake", "`restore()` puts back everything that is kept, or refuses weights that are not finite and changes nothing"),
    131: Fault("bases through torch's own distributed checkpoint recipe", "they travel and come back bitwise; a flattened state is refused until they are loaded"),
    132: Fault("weight averaging and `update_bn` on copies and on the model", "hooks do nothing on copies; statistics that were reset are put back and named"),
    133: Fault("a task whose gradient has hardly a free part", "one warning with the share, before it is trained"),
    134: Fault("a projected gradient that is rounding, or has overflowed", "rounding is no gradient; an overflow stays to be found"),
    135: Fault("interpolation with earlier weights", "`blend` moves what is free; kept directions and frozen values stay"),
    136: Fault("heads of finished tasks that a new optimizer does not step", "their bases load and wait in it"),
    137: Fault("bases named by a loss module around the model", "they load into the model inside it, and back"),
}  # fmt: skip

PARTS: dict[str, dict[int, Fault]] = {
    "Gradients and steps": STEPS,
    "Parameters and groups": PARAMETERS,
    "Consolidation: data": DATA,
    "Consolidation: model": MODEL,
    "Bases and numerics": NUMERICS,
    "Files": FILES,
    "Several processes": PROCESSES,
    "iGSP, CLIP losses, command line, experiment": AROUND,
    "Shapes that grow, modules that are replaced": GROWTH,
    "Training loops and checkpoints": LOOPS,
}
FAULTS: dict[int, Fault] = {number: fault for part in PARTS.values() for number, fault in part.items()}

EXCUSED: dict[int, str] = {}
