"""Dependencies of an operator's result on its operands: the list of operators whose structure is known.

A rule of `RULES` looks at one call of an operator and returns its *pullback*: from the elements of the result that
reach the model's output to the elements of each operand that they depend on. Only positions decide: a factor, a gate or
a weight that is zero cuts nothing off. Values are read in one case, where a tensor that depends on no parameter, no
activation and no random number is a mask: zeros and ones that multiply, truth values that choose, `-inf` (or the lowest
number) that attention adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..operators import Operator
from .reach import Reach, anything

Pullback = Callable[[Reach], Sequence[Reach]]
LOWEST = -1e30


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    `arguments` stand in the order of the schema; `reads` are the operands to account for, by position in the schema
    (those of a list one after another); `known` says of an argument that it depends on no parameter, no activation and
    no random number.
    """

    operator: Operator
    function: Callable[..., Any]
    arguments: Sequence[Any]
    reads: Sequence[tuple[int, Tensor]]
    result: Tensor
    known: Callable[[Any], bool]

    def option(self, name: str, default: Any = None) -> Any:
        """Return the argument called `name`, or `default` where the operator has none."""
        names = self.operator.arguments
        return self.arguments[names.index(name)] if name in names else default


Rule = Callable[[Call], Pullback]


def _expanded(reach: Tensor, shape: Sequence[int]) -> Reach:
    """Repeat a mask along its dimensions of size 1; all elements where the shapes do not fit."""
    fits = reach.ndim == len(shape) and all(r in (1, s) for r, s in zip(reach.shape, shape, strict=True))
    return reach.expand(shape) if fits else anything(reach)


def _unbroadcast(reach: Reach, shape: Sequence[int]) -> Reach:
    """Return which elements of an operand of `shape` were broadcast to any element of `reach`."""
    if isinstance(reach, bool):
        return reach
    extra = reach.ndim - len(shape)
    if extra < 0:
        return anything(reach)
    if extra:
        reach = reach.flatten(0, extra - 1).any(0)
    dims = [dim for dim, size in enumerate(shape) if size == 1 and reach.shape[dim] != 1]
    return _expanded(reach.any(dims, keepdim=True) if dims else reach, shape)


def _each(call: Call, pull: Callable[[int, torch.Size, Reach], Reach]) -> Pullback:
    """Return the pullback that asks `pull` for each operand by its position and shape."""
    shapes = [(position, tensor.shape) for position, tensor in call.reads]
    return lambda reach: [pull(position, shape, reach) for position, shape in shapes]


def _whole(call: Call) -> Pullback:
    """Every element of the result depends on every element of each operand."""
    return _each(call, lambda position, shape, reach: anything(reach))


def _elementwise(call: Call) -> Pullback:
    """Each element of the result depends on the elements at its place, broadcast."""
    return _each(call, lambda position, shape, reach: _unbroadcast(reach, shape))


def _mixing(dims: Callable[[Call], Sequence[int]]) -> Rule:
    """Operand 0 is mixed along `dims`, and the other dimensions stay apart."""

    def rule(call: Call) -> Pullback:
        mixed = list(dims(call))

        def pull(position: int, shape: torch.Size, reach: Reach) -> Reach:
            if isinstance(reach, bool) or position or reach.shape != shape or not reach.ndim:
                return anything(reach)
            return reach.any(mixed, keepdim=True).expand(shape)

        return _each(call, pull)

    return rule


def _per_sample(call: Call) -> Pullback:
    """Samples (dimension 0 of the result and of operand 0, a grid as well) stay apart."""
    per_sample = (0, 1) if call.operator.name.startswith("grid_sampler") else (0,)
    if "convolution" in call.operator.name and call.result.ndim != call.arguments[1].ndim:
        return _whole(call)  # without a dimension of samples

    def pull(position: int, shape: torch.Size, reach: Reach) -> Reach:
        if isinstance(reach, bool) or position not in per_sample or not shape or reach.shape[0] != shape[0]:
            return anything(reach)
        return reach.flatten(1).any(1).view(-1, *[1] * (len(shape) - 1)).expand(shape)

    return _each(call, pull)


def _normalized(call: Call) -> Pullback:
    """Batch norm on running statistics leaves elements apart; on those of the batch it mixes all."""
    training = call.option("training", "no_training" not in call.operator.name)
    return _whole(call) if training else _each(call, lambda p, shape, r: anything(r) if p else _unbroadcast(r, shape))


def _reduced(call: Call) -> Pullback:
    """Reductions over the argument `dim` (all dimensions where it is `None`, empty or missing)."""
    dims, keep = call.option("dim"), call.option("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims

    def pull(position: int, shape: torch.Size, reach: Reach) -> Reach:
        if isinstance(reach, bool) or position or not dims or not shape:
            return anything(reach)
        for dim in sorted(d % len(shape) for d in dims):
            reach = reach if keep else reach.unsqueeze(dim)
        return _expanded(reach, shape)

    return _each(call, pull)


def _product(first: int) -> Rule:
    """Matrix products: row `i` of the left operand meets row `i` of the result, column `j` of the right one column `j`.

    `first` is the position of the left operand; with 1, argument 0 is added to the product.
    """

    def rule(call: Call) -> Pullback:
        linear = call.operator.name == "linear"

        def pull(position: int, shape: torch.Size, reach: Reach) -> Reach:
            if isinstance(reach, bool) or (linear and position):
                return anything(reach)
            if position < first:
                return _unbroadcast(reach, shape)
            return _expanded(reach.any(-1 if position == first else -2, keepdim=True), shape)

        return _each(call, pull)

    return rule


def _looked_up(call: Call) -> Pullback:
    """Embeddings: a looked-up row depends on its index, and on any row of the weight."""
    return _each(call, lambda p, shape, r: anything(r) if p != 1 or isinstance(r, bool) else r.any(-1))


def _mask(call: Call, argument: Any, *, truth: bool = False) -> Tensor | None:
    """Return a known mask, or `None` if `argument` is none: a scalar, or one that holds all or nothing, is a gate."""
    if not isinstance(argument, Tensor) or argument.numel() < 2 or not call.known(argument):
        return None
    mask = argument.ne(0)
    if argument.dtype != torch.bool and (truth or not bool((mask.logical_not() | (argument == 1)).all())):
        return None
    return mask if 0 < int(mask.sum()) < mask.numel() else None


def _chosen(call: Call, masks: dict[int, Tensor | None]) -> Pullback:
    """Elementwise, and a mask says which elements of an operand reach the result."""
    shape = call.result.shape

    def pull(position: int, operand: torch.Size, reach: Reach) -> Reach:
        mask = masks.get(position)
        if mask is not None and reach is not False:
            allowed = mask.expand(shape)
            reach = allowed if isinstance(reach, bool) else reach & allowed
        return _unbroadcast(reach, operand)

    return _each(call, pull)


def _multiplied(call: Call) -> Pullback:
    """Products of two tensors: a mask cuts off what it multiplies by zero."""
    one, other = call.arguments[:2]
    return _chosen(call, {0: _mask(call, other), 1: _mask(call, one)})


def _where(call: Call) -> Pullback:
    """`where(condition, a, b)`."""
    condition = _mask(call, call.arguments[0], truth=True)
    return _chosen(call, {1: condition, 2: None if condition is None else ~condition})


def _filled(call: Call) -> Pullback:
    """`masked_fill(x, mask, value)`."""
    mask = _mask(call, call.arguments[1], truth=True)
    return _chosen(call, {0: None if mask is None else ~mask})


def _overwritten(call: Call) -> Pullback:
    """Some elements of operand 0 are replaced or added to, at any place."""
    return _each(call, lambda p, shape, r: anything(r) if p else _unbroadcast(r, shape))


def _selected(call: Call) -> Pullback:
    """Elements of operand 0 are selected, repeated or moved by known positions: the operator is run on positions."""
    others = dict(zip(call.operator.arguments[1:], call.arguments[1:], strict=True))
    tensors = [leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, Tensor)]
    if any(position for position, _ in call.reads) or not all(call.known(tensor) for tensor in tensors):
        return _whole(call)
    others = pytree.tree_map_only(Tensor, Tensor.clone, others)
    if "value" in others:
        others["value"] = 0
    shape, device, function = call.reads[0][1].shape, call.reads[0][1].device, call.function

    def pull(reach: Reach) -> Sequence[Reach]:
        if reach is False:
            return [False]
        numbered = torch.arange(1, shape.numel() + 1, dtype=torch.float64, device=device).view(shape)
        origins = function(numbered, **others).long()
        flags = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=device)
        flags[origins.flatten() if isinstance(reach, bool) else origins[reach]] = True
        return [flags[1:].view(shape)]

    return pull


def _joined(call: Call) -> Pullback:
    """`cat` and `stack`: each tensor of the list is one slice of the result."""
    stacked = call.operator.name == "stack"
    dim, parts, start = call.option("dim", 0), [], 0
    for tensor in call.arguments[0]:
        length = 1 if stacked else (tensor.shape[dim] if tensor.shape != (0,) else 0)
        if any(tensor is read for _, read in call.reads):
            parts.append((start, length, tensor.shape))
        start += length

    def pull(reach: Reach) -> Sequence[Reach]:
        if isinstance(reach, bool):
            return [reach] * len(parts)
        slices = [reach.narrow(dim, start, length) for start, length, _ in parts]
        return [(s.squeeze(dim) if stacked else s).reshape(p[2]) for s, p in zip(slices, parts, strict=True)]

    return pull


def _halves(call: Call) -> Pullback:
    """Gated linear units: both halves along `dim` meet the result."""
    dim = call.option("dim", -1)
    return _each(call, lambda p, shape, r: r if isinstance(r, bool) else torch.cat([r, r], dim))


def _attended(call: Call) -> Pullback:
    """Fused attention: queries `[..., L, E]`, keys and values `[..., S, E]`; heads are taken together."""
    query, key = call.arguments[0].shape, call.arguments[1].shape
    allowed = _attention_mask(call, query[-2], key[-2])
    device = call.result.device

    def pull(position: int, shape: torch.Size, reach: Reach) -> Reach:
        if reach is False or (reach is True and (position == 0 or allowed is None)) or position > 2:
            return anything(reach)
        rows = torch.ones(query[:-1], dtype=torch.bool, device=device) if reach is True else reach.any(-1)
        if position:
            rows = rows.any(-2, keepdim=True) if rows.ndim == 3 else rows  # [B, 1, L]
            if allowed is None:
                rows = rows.any(-1, keepdim=True)
            else:
                rows = (rows.float().unsqueeze(-2) @ allowed.float()).squeeze(-2) > 0
        return _expanded(rows.unsqueeze(-1), shape)

    return _each(call, pull)


def _attention_mask(call: Call, length: int, keys: int) -> Tensor | None:
    """Return the keys `[..., S]` that each query may attend to by position, heads taken together; `None`: all."""
    given = call.option("attn_mask", call.option("attn_bias"))
    if given is None:
        causal = call.option("is_causal", False)
        return call.result.new_ones(length, keys, dtype=torch.bool).tril() if causal else None
    if not call.known(given):
        return None
    lowest = LOWEST if not given.is_floating_point() else max(LOWEST, torch.finfo(given.dtype).min)
    allowed = given.clone() if given.dtype == torch.bool else given > lowest
    allowed = allowed.expand(*given.shape[:-2], length, keys)
    allowed = allowed.view(*[1] * (4 - allowed.ndim), *allowed.shape).any(1, keepdim=True)
    reaching: Tensor = allowed | ~allowed.any(-1, keepdim=True)  # a query that may attend to nothing may attend to all
    return reaching


def _rules(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rules(
        "abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh cosh "
        "tanh asinh acosh atanh erf erfc erfinv sigmoid logit silu mish gelu relu relu6 hardtanh hardswish hardsigmoid "
        "leaky_relu elu celu selu softplus softshrink hardshrink threshold log_sigmoid_forward sinc lgamma digamma "
        "clamp clamp_min clamp_max clone _to_copy contiguous lift_fresh lift_fresh_copy alias_copy detach_copy "
        "positive conj_physical resolve_conj resolve_neg angle add sub rsub div true_divide remainder fmod pow "
        "float_power atan2 hypot addcmul addcdiv lerp logaddexp logaddexp2 xlogy special_xlog1py _prelu_kernel copy "
        "fill zero complex polar",
        _elementwise,
    ),
    "mul": _multiplied,
    "where": _where,
    "masked_fill": _filled,
    **_rules("_softmax _log_softmax _safe_softmax", _mixing(lambda call: [call.arguments[1]])),
    **_rules("cumsum cumprod logcumsumexp", _mixing(lambda call: [call.arguments[1]])),
    **_rules("native_layer_norm _fused_rms_norm", _mixing(lambda call: range(-len(call.arguments[1]), 0))),
    "glu": _halves,
    **_rules("sum mean nansum nanmean prod var std var_mean std_mean logsumexp linalg_vector_norm norm", _reduced),
    **_rules("mm bmm linear", _product(0)),
    **_rules("addmm baddbmm", _product(1)),
    **_rules("convolution _convolution convolution_overrideable", _per_sample),
    **_rules("max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d", _per_sample),
    **_rules("_adaptive_avg_pool3d native_group_norm grid_sampler_2d grid_sampler_3d", _per_sample),
    **_rules("upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d", _per_sample),
    **_rules("upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_bilinear2d_aa", _per_sample),
    **_rules("native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit", _normalized),
    **_rules("_native_batch_norm_legit_no_training", _normalized),
    "embedding": _looked_up,
    **_rules("index index_select gather take masked_select flip roll repeat tril triu im2col pixel_shuffle", _selected),
    **_rules("pixel_unshuffle channel_shuffle constant_pad_nd reflection_pad1d reflection_pad2d", _selected),
    **_rules("replication_pad1d replication_pad2d replication_pad3d reflection_pad3d", _selected),
    **_rules("cat stack", _joined),
    **_rules("index_put index_add index_copy index_fill scatter scatter_add masked_scatter", _overwritten),
    **_rules("slice_scatter select_scatter diagonal_scatter as_strided_scatter", _overwritten),
    **_rules(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
        _attended,
    ),
    **_rules("dot vdot mv addmv addr _trilinear _cdist_forward _euclidean_dist _pdist_forward linalg_cross", _whole),
    **_rules("mse_loss smooth_l1_loss huber_loss nll_loss_forward nll_loss2d_forward", _whole),
    **_rules("binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss multi_margin_loss", _whole),
    **_rules("multilabel_margin_loss_forward _ctc_loss _fft_r2c _fft_c2r _fft_c2c _embedding_bag", _whole),
}
