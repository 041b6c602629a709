"""The backward of the attention in the heads, one kernel for both directions."""

import triton
import triton.language as tl

from refsam_kernels.token_image_attention.triton.tiles import _of_head


@triton.jit(do_not_specialize=["expressions", "queries", "keys"])
def _backward_kernel(
    grad_ptr,  # (expressions, internal width, queries), of the attended values
    q_ptr,  # (expressions, internal width, queries)
    k_ptr,  # (expressions, internal width, keys)
    v_ptr,  # (expressions, internal width, keys)
    attended_ptr,  # (expressions, internal width, queries)
    log_sum_exp_ptr,  # (expressions, heads, queries) float32
    lengths_ptr,  # (expressions,) int64, or None
    grad_q_ptr,  # (key tiles, expressions, internal width, queries)
    grad_k_ptr,  # (query tiles, expressions, internal width, keys)
    grad_v_ptr,  # likewise
    expressions, queries, keys, heads, head_width, scale,
    HAS_ALL_KEYS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One head of QUERIES queries and KEYS keys; gradients to one side are parts, one for each tile of the other."""
    query_tile, key_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    expression, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads
    width = heads * head_width
    length = keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + expression)
    query = query_tile * QUERIES + tl.arange(0, QUERIES)
    key = key_tile * KEYS + tl.arange(0, KEYS)
    o_query, is_query = _of_head(
        head, query_tile * QUERIES, queries, head_width, queries, 1, HEAD, QUERIES
    )
    o_key, is_key = _of_head(head, key_tile * KEYS, keys, head_width, keys, 1, HEAD, KEYS)
    i_query, i_key = expression * width * queries, expression * width * keys
    b_q = tl.load(q_ptr + i_query + o_query, mask=is_query, other=0.0)
    b_grad = tl.load(grad_ptr + i_query + o_query, mask=is_query, other=0.0)
    b_k = tl.load(k_ptr + i_key + o_key, mask=is_key, other=0.0)
    b_v = tl.load(v_ptr + i_key + o_key, mask=is_key, other=0.0)
    scores = tl.dot(tl.trans(b_q), b_k) * scale
    scores = tl.where((key < length)[None, :], scores, float("-inf"))
    dp = tl.dot(tl.trans(b_grad), b_v)
    if HAS_ALL_KEYS:
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        p /= tl.sum(p, 1)[:, None]
        delta = tl.sum(p * dp, 1)
    else:  # the same from the forward's saved values, which are rounded
        p_sums = log_sum_exp_ptr + (expression * heads + head) * queries + query
        lse = tl.load(p_sums, mask=query < queries, other=0.0)
        p = tl.exp(scores - lse[:, None])
        b_attended = tl.load(attended_ptr + i_query + o_query, mask=is_query, other=0.0)
        delta = tl.sum(b_grad.to(tl.float32) * b_attended.to(tl.float32), 0)
    ds = p * (dp - delta[:, None]) * scale
    ds = ds.to(b_q.dtype)
    b_grad_q = tl.dot(b_k, tl.trans(ds))
    b_grad_k = tl.dot(b_q, ds)
    b_grad_v = tl.dot(b_grad, p.to(b_grad.dtype))
    i_query += key_tile * expressions * width * queries
    i_key += query_tile * expressions * width * keys
    tl.store(
        grad_q_ptr + i_query + o_query, b_grad_q.to(grad_q_ptr.dtype.element_ty), mask=is_query
    )
    tl.store(grad_k_ptr + i_key + o_key, b_grad_k.to(grad_k_ptr.dtype.element_ty), mask=is_key)
    tl.store(grad_v_ptr + i_key + o_key, b_grad_v.to(grad_v_ptr.dtype.element_ty), mask=is_key)
