"""PEGP and PGP: prompts, prefixes, adapters and LoRA by gradient projection (Qiao et al. 2024, arXiv 2405.13383)."""

from __future__ import annotations

from dataclasses import dataclass

from .energy import Energy


@dataclass(frozen=True)
class PEGP(Energy):
    """GPM's rule on the parameters of parameter-efficient tuning, with the paper's `threshold` of 0.90.

    The paper asks that an update be orthogonal to old inputs *and* old prompts: the rows of a prompt are the tokens
    it stands beside and the prompts themselves, which `declare_tokens` hands to `consolidate`; adapters and LoRA are
    plain products whose rows capture sees. A prefix of a model of one's own is declared by its rows: queries for its
    keys, attention for its values (`declare_rows`). PEFT's prefix tuning keeps keys and values of all layers in one
    looked-up matrix, which `consolidate` freezes. Exact for the kept directions; old outputs move by what was cut off,
    and for prompts by the value path of attention, which no published code covers either.

    The released code trains a second copy of the prompts for five epochs *without* projection after a task and takes
    the mean of both: it keeps nothing exactly. It multiplies embeddings by a projector of *samples*, which fits only
    because 24 * 32 = 768, and compares fourth powers of singular values with the threshold. Here no step is without
    projection, and it is the paper's feature space and energy.
    """

    threshold: float = 0.90
