"""Attention, residual and LayerNorm with channels first in the heads, and the explicit gradient.

Queries, keys and values are projected to (P, I, T): heads are then views, not copies, and of the two sequences the longer one is
innermost in every product and every softmax, so that those run over whole vectors. A few expressions at a time keep
intermediate results in a CPU's cache.

Two biases need no pass over the keys: that of k adds the same to all logits of a query, which changes nothing, and the softmax's
weights sum to one, so that of v moves behind the attention and into the output projection's.

Where nothing is kept for a gradient and the tokens are few, `absorbed` does without the projections of the pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from refsam_kernels.core.chunking import chunks
from refsam_kernels.core.index_checks import valid_positions
from refsam_kernels.token_image_attention.absorbed import Absorbed, is_cheaper_absorbed
from refsam_kernels.token_image_attention.inputs import Inputs, Outputs
from refsam_kernels.token_image_attention.projection import (
    PositionGradient,
    Projection,
    ProjectionGradient,
    for_each,
)

AttendBackward = Callable[..., Iterable[Tensor]]


class _Projected:
    """The sum of queries and update, (P, Tq, C), for some expressions at a time, by projections into the heads."""

    def __init__(self, inputs: Inputs, remember: bool) -> None:
        queries, keys, query_pe, key_pe = inputs[:4]
        self.key_lengths, self.num_heads = inputs.key_lengths, inputs.num_heads
        q_weight, q_bias, k_weight, _, v_weight, v_bias, out_weight, out_bias = inputs.weights
        content = keys.to(k_weight.dtype)
        self.queries, self.wide = queries, torch.promote_types(queries.dtype, torch.float32)
        self.to_q = Projection(queries, query_pe, q_weight, q_bias, remember)
        self.to_k = Projection(content, key_pe, k_weight, None, remember)
        self.to_v = Projection(content, None, v_weight, None)
        self.out_weight, self.added = out_weight, torch.addmv(out_bias, out_weight, v_bias)

    def __call__(self, part: slice) -> Tensor:
        return self.sum(self.heads(part)[3], part)

    def heads(self, part: slice) -> tuple[Tensor, ...]:
        """q, k, v and the attended values, each (P, I, T), and log-sum-exps (P, heads, Tq)."""
        q, k, v = self.to_q(part), self.to_k(part), self.to_v(part)
        lengths = _part(self.key_lengths, part)
        return q, k, v, *_attend_in_parts(q, k, v, lengths, self.num_heads)

    def sum(self, attended: Tensor, part: slice) -> Tensor:
        """The queries and the output projection of (P, I, Tq), in float32 at least."""
        weight = for_each(self.out_weight.mT, attended)
        update = torch.baddbmm(self.added, attended.mT, weight)
        return update.to(self.wide).add_(self.queries[part])


def forward(inputs: Inputs) -> Outputs:
    """Like `reference.forward`: products in the dtype of the weights, sum, softmax and LayerNorm in float32 at least."""
    inputs = without_padding(inputs)
    queries, eps = inputs.queries, inputs.eps
    wide = torch.promote_types(queries.dtype, torch.float32)
    norm = (inputs.norm_weight.to(wide), inputs.norm_bias.to(wide))
    if inputs.keep:  # made for all expressions at once, so that nothing need be joined
        projected = _Projected(inputs, remember=False)
        every = slice(len(queries))
        heads = projected.heads(every)
        x = projected.sum(heads[3], every)
        out, *statistics = torch.native_layer_norm(x, x.shape[-1:], *norm, eps)
        return Outputs(out.to(queries.dtype), x, torch.cat(statistics, dim=-1), *heads)
    is_absorbed = is_cheaper_absorbed(inputs)
    sums = Absorbed(inputs) if is_absorbed else _Projected(inputs, remember=True)
    shape = queries.shape[-1:]
    slices = _slices(queries, inputs.keys, len(inputs.q_weight), inputs.num_heads)
    parts = (torch.native_layer_norm(sums(part), shape, *norm, eps)[0] for part in slices)
    rest = (queries.new_empty(0) for _ in range(7))
    return Outputs(_joined(parts, slices, queries), *rest)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    attend_backward: AttendBackward | None = None,
) -> tuple[Tensor | None, ...]:
    """Like `reference.backward`; of the forward only the softmax is computed again.

    `attend_backward` computes the attention's own gradients, like `_attend_backward`, for some expressions at a time.
    """
    inputs = without_padding(inputs)
    own_backward: AttendBackward = attend_backward or _attend_backward
    queries, keys, query_pe, key_pe = inputs[:4]
    q_weight, _, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias = inputs.weights
    _, x, statistics, q, k, v, attended, log_sum_exp = outputs
    (grad,), num_heads = grads, inputs.num_heads
    of_queries = ProjectionGradient(queries, q_weight)
    of_keys = ProjectionGradient(keys, torch.cat([k_weight, v_weight]))
    of_query_pe = PositionGradient(query_pe, q_weight, q.shape[2], needs[2])
    of_key_pe = PositionGradient(key_pe, k_weight, k.shape[2], needs[3])
    norm = (inputs.norm_weight.to(x.dtype), inputs.norm_bias.to(x.dtype))
    grad_out = [x.new_zeros(t.shape) for t in (out_weight, out_bias, *norm)]
    grad_queries, grad_keys = torch.empty_like(queries), torch.empty_like(keys)
    for part in _slices(queries, keys, len(q_weight), num_heads):
        grad_x, grad_update, *parameters = _output_backward(
            grad[part], x[part], statistics[part], attended[part], norm, out_weight.dtype
        )
        for total, share in zip(grad_out, parameters, strict=True):
            total += share
        grad_attended = for_each(out_weight.mT, grad_x) @ grad_update.mT
        heads = (t[part] for t in (q, k, v, attended, log_sum_exp))
        grad_q, grad_k, grad_v = own_backward(
            grad_attended, *heads, _part(inputs.key_lengths, part), num_heads
        )
        of_query_pe.add(grad_q, part)
        of_key_pe.add(grad_k, part)
        torch.add(grad_x, of_queries(grad_q, part), out=grad_queries[part])
        grad_keys[part] = of_keys(torch.cat([grad_k, grad_v], dim=1), part)
    grad_query_pe, grad_q_weight, grad_q_bias = of_query_pe.totals()
    grad_key_pe, grad_k_weight, _ = of_key_pe.totals()
    grad_q_weight = grad_q_weight + of_queries.grad_weight
    of_k, grad_v_weight = of_keys.grad_weight.chunk(2)
    grad_k_weight = grad_k_weight + of_k
    grad_out_weight, grad_out_bias, *grad_norm = grad_out
    grad_out_weight.addr_(grad_out_bias, v_bias.to(x.dtype))
    grad_v_bias = out_weight.T.to(x.dtype) @ grad_out_bias
    of_inputs = (grad_queries, grad_keys, grad_query_pe, grad_key_pe)
    of_heads = (
        grad_q_weight,
        grad_q_bias,
        grad_k_weight,
        torch.zeros_like(k_bias),
        grad_v_weight,
        grad_v_bias,
    )
    return (*of_inputs, *of_heads, grad_out_weight, grad_out_bias, *grad_norm)


def _output_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    attended: Tensor,
    norm: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients to x (P, T, C), to the output projection's result in `dtype`, its weight and bias, and the norm's."""
    mean_deviation = (t.contiguous() for t in statistics.split(1, dim=-1))
    grad_x, *grad_norm = torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, x.shape[-1:], *mean_deviation, *norm, [True, True, True]
    )
    grad_update = grad_x.to(dtype)
    grad_weight = (attended @ grad_update).sum(0, dtype=x.dtype).T
    return grad_x, grad_update, grad_weight, grad_x.sum((0, 1)), *grad_norm


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, num_heads: int
) -> tuple[Tensor, ...]:
    """`_attend`, some expressions at a time, so that their logits stay in the cache."""
    slices = _slices(q.mT, k.mT, q.shape[1], num_heads)
    parts = [_attend(q[p], k[p], v[p], _part(key_lengths, p), num_heads) for p in slices]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """softmax(q^T k / sqrt(d)) v^T of q (P, I, Tq), k and v (P, I, Tk): (P, I, Tq), and log-sum-exps (P, heads, Tq)."""
    qs, ks, vs = (_heads(t, num_heads) for t in (q, k, v))
    logits = _logits(qs, ks, key_lengths, num_heads)
    weights = _softmax(logits)
    attended = _product(vs, weights.to(v.dtype).mT).reshape(q.shape)
    # The largest weight is exp(largest logit - log-sum-exp).
    log_sum_exp = logits.amax(dim=-1).sub_(weights.amax(dim=-1).log_())
    return attended, log_sum_exp.view(len(q), num_heads, q.shape[2])


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    log_sum_exp: Tensor,
    key_lengths: Tensor | None,
    num_heads: int,
) -> Iterator[Tensor]:
    """Gradients to q, k and v for `grad`, the gradient to the first result of `_attend`, (P, I, Tq).

    The forward's log-sum-exp is not used: on a CPU, a softmax costs less than an exponential.
    """
    grads, qs, ks, vs = (_heads(t, num_heads) for t in (grad, q, k, v))
    weights = _softmax(_logits(qs, ks, key_lengths, num_heads))
    grad_v = _product(grads, weights.to(v.dtype))
    # Converted before it is multiplied: a product of two dtypes takes a CPU many times as long.
    weighted = _outer(grads, vs).to(weights.dtype).mul_(weights)
    grad_logits = weighted.addcmul_(weights, weighted.sum(dim=-1, keepdim=True), value=-1)
    grad_logits = grad_logits.mul_(qs.shape[1] ** -0.5).to(q.dtype)
    grad_q, grad_k = _product(ks, grad_logits.mT), _product(qs, grad_logits)
    return (t.reshape(own.shape) for t, own in ((grad_q, q), (grad_k, k), (grad_v, v)))


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(P, I, T) -> (P * heads, d, T), without a copy."""
    expressions, width, count = tokens.shape
    return tokens.view(expressions * num_heads, width // num_heads, count)


def _logits(q: Tensor, k: Tensor, key_lengths: Tensor | None, num_heads: int) -> Tensor:
    """q^T k / sqrt(d) of (P * heads, d, T), in float32 at least; -inf for keys that are padding."""
    logits = _outer(q, k).to(torch.promote_types(q.dtype, torch.float32))
    logits.mul_(q.shape[1] ** -0.5)
    if key_lengths is not None:
        padding = ~valid_positions(key_lengths, k.shape[2])
        of_expressions = logits.unflatten(0, (len(padding), num_heads))
        of_expressions.masked_fill_(padding[:, None, None], float("-inf"))
    return logits


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in the memory layout of the logits: torch would copy them."""
    return logits.softmax(-1) if logits.is_contiguous() else logits.mT.softmax(-2).mT


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of (P * heads, d, T) each; of the result's last two dimensions the longer one is innermost in memory."""
    if x.shape[2] <= y.shape[2]:
        return torch.bmm(x.mT, y)
    return torch.bmm(y.mT, x).mT


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y of (P * heads, d, T) and (P * heads, T, S), in the order of the operands that is faster."""
    return torch.bmm(y.mT, x.mT).mT if y.shape[1] > y.shape[2] else torch.bmm(x, y)


def without_padding(inputs: Inputs) -> Inputs:
    """The inputs with zeros for padding in keys and positions; shared positions stay where any expression has them."""
    if inputs.key_lengths is None:
        return inputs
    keys, key_pe = inputs.keys, inputs.key_pe
    padding = ~valid_positions(inputs.key_lengths, keys.shape[1])
    unused = padding if len(key_pe) == len(keys) else padding.all(dim=0, keepdim=True)
    return inputs._replace(
        keys=keys.masked_fill(padding[..., None], 0.0),
        key_pe=key_pe.masked_fill(unused[..., None], 0.0),
    )


def _slices(queries: Tensor, keys: Tensor, width: int, num_heads: int) -> list[slice]:
    """Slices of expressions whose largest intermediate fits a CPU's cache: tokens in the heads, or logits."""
    counts = queries.shape[1], keys.shape[1]
    logits = num_heads * counts[0] * counts[1] if queries.device.type == "cpu" else 0
    elements = max(max(counts) * width, logits)
    return list(chunks(len(queries), elements, queries.device)) or [slice(0)]


def _joined(parts: Iterable[Tensor], slices: Sequence[slice], queries: Tensor) -> Tensor:
    """The parts of a result like the queries; each is written while it is in the cache, and one alone is not copied."""
    if len(slices) == 1:
        return next(iter(parts)).to(queries.dtype)
    result = queries.new_empty(queries.shape)
    for part, values in zip(slices, parts, strict=True):
        result[part] = values
    return result


def _part(key_lengths: Tensor | None, part: slice) -> Tensor | None:
    return None if key_lengths is None else key_lengths[part]
