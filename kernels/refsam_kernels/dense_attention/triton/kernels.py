"""Hierarchical dense attention in Triton, absorbed as in `fallback.py`: one launch for all levels and expressions.

A program holds a tile of pixels: it mixes the levels' features and their attention in registers and multiplies each once, with W1
and with the absorbed text T W2^T. The backward has two kernels: one per expression, whose sums over pixels are partial sums per
tile, and one per image, which adds up its expressions in their order. No atomics: two runs agree bit by bit.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(pointer, first_row, row_count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a contiguous matrix (..., width) from `first_row` on, (ROWS, WIDTH): zeros from `row_count` rows on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < row_count)[:, None] & (column < width)[None, :]
    offset = (first_row + row)[:, None] * width + column[None, :]
    return tl.load(pointer + offset, mask=inside, other=0.0)


@triton.jit
def _store_rows(
    pointer, rows, first_row, row_count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The opposite of `_load_rows`."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < row_count)[:, None] & (column < width)[None, :]
    offset = (first_row + row)[:, None] * width + column[None, :]
    tl.store(pointer + offset, rows.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _attend(pixels, words, scale, length, WORDS: tl.constexpr):
    """Similarity of pixels (M, C) and words (WORDS, C), and the softmax over the first `length` words, float32 (M, WORDS)."""
    similarity = tl.dot(pixels, tl.trans(words))
    is_word = (tl.arange(0, WORDS) < length)[None, :]
    logits = tl.where(is_word, similarity * scale, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return similarity, weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["images", "words"])
def _forward_kernel(
    features_ptr,  # (levels, images, pixels, channels)
    text_ptr,  # (expressions, words, channels)
    absorbed_ptr,  # (expressions, words, channels), text W2^T
    lengths_ptr,  # (expressions,) int64
    image_index_ptr,  # (expressions,) int64
    weight_ptr,  # (channels, 2 * channels)
    bias_ptr,  # (channels,)
    scale_ptr,  # ()
    level_weights_ptr,  # (levels,)
    dense_ptr,  # (expressions, pixels, channels)
    levels, images, pixels, words, channels,
    PIXELS: tl.constexpr, WORDS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of one expression."""
    i_pixel = tl.program_id(0).to(tl.int64) * PIXELS
    i_expression = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_expression)
    image = tl.load(image_index_ptr + i_expression)
    scale = tl.load(scale_ptr).to(tl.float32)
    left = pixels - i_pixel
    b_text = _load_rows(text_ptr, i_expression * words, length, channels, WORDS, CHANNELS)
    b_mixed = tl.zeros((PIXELS, CHANNELS), tl.float32)
    b_attention = tl.zeros((PIXELS, WORDS), tl.float32)
    total_share = 0.0
    for level in range(levels):
        share = tl.load(level_weights_ptr + level).to(tl.float32)
        first = (level * images + image) * pixels + i_pixel
        b_own = _load_rows(features_ptr, first, left, channels, PIXELS, CHANNELS)
        _, p = _attend(b_own, b_text, scale, length, WORDS)
        b_attention += share * p
        b_mixed += share * b_own.to(tl.float32)
        total_share += share
    b_mixed = b_mixed.to(text_ptr.dtype.element_ty)
    b_attention = b_attention.to(text_ptr.dtype.element_ty)
    channel, word = tl.arange(0, CHANNELS), tl.arange(0, WORDS)
    for start in range(0, CHANNELS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < channels
        m_own = (channel < channels)[:, None] & is_column[None, :]
        p_own = weight_ptr + column[None, :] * (2 * channels) + channel[:, None]
        b_own = tl.load(p_own, mask=m_own, other=0.0)  # W1 transposed
        m_absorbed = (word < length)[:, None] & is_column[None, :]
        p_absorbed = (
            absorbed_ptr + (i_expression * words + word)[:, None] * channels + column[None, :]
        )
        b_absorbed = tl.load(p_absorbed, mask=m_absorbed, other=0.0)
        b_bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        b_dense = tl.dot(b_mixed, b_own)
        b_dense += tl.dot(b_attention, b_absorbed)
        b_dense += (total_share * b_bias)[None, :]
        row = tl.arange(0, PIXELS)
        offset = (i_expression * pixels + i_pixel + row)[:, None] * channels + column[None, :]
        inside = (row < left)[:, None] & is_column[None, :]
        tl.store(dense_ptr + offset, b_dense.to(dense_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "expressions", "words"])
def _text_backward_kernel(
    grad_ptr,  # (expressions, pixels, channels)
    features_ptr,  # (levels, images, pixels, channels)
    text_ptr,  # (expressions, words, channels)
    absorbed_ptr,  # (expressions, words, channels)
    lengths_ptr,  # (expressions,) int64
    image_index_ptr,  # (expressions,) int64
    scale_ptr,  # ()
    level_weights_ptr,  # (levels,)
    grad_similarity_ptr,  # (levels, expressions, pixels, WORDS), the gradient to F T^T
    grad_text_ptr,  # (tiles, expressions, words, channels) float32, through the similarity
    grad_absorbed_ptr,  # (tiles, expressions, words, channels) float32
    grad_scale_ptr,  # (tiles, expressions, levels) float32
    grad_share_ptr,  # (tiles, expressions, levels) float32, through the attention
    levels, images, expressions, pixels, words, channels,
    PIXELS: tl.constexpr, WORDS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of one expression: gradients to the similarities, and sums over the pixels."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_pixel = i_tile * PIXELS
    i_expression = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_expression)
    image = tl.load(image_index_ptr + i_expression)
    scale = tl.load(scale_ptr).to(tl.float32)
    left = pixels - i_pixel
    is_pixel = (tl.arange(0, PIXELS) < left)[:, None]
    b_text = _load_rows(text_ptr, i_expression * words, length, channels, WORDS, CHANNELS)
    b_absorbed = _load_rows(absorbed_ptr, i_expression * words, length, channels, WORDS, CHANNELS)
    first = i_expression * pixels + i_pixel
    b_grad = _load_rows(grad_ptr, first, left, channels, PIXELS, CHANNELS)
    b_grad_attention = tl.dot(b_grad, tl.trans(b_absorbed))
    b_attention = tl.zeros((PIXELS, WORDS), tl.float32)
    b_grad_text = tl.zeros((WORDS, CHANNELS), tl.float32)
    i_sums = (i_tile * expressions + i_expression) * levels
    for level in range(levels):
        share = tl.load(level_weights_ptr + level).to(tl.float32)
        first = (level * images + image) * pixels + i_pixel
        b_own = _load_rows(features_ptr, first, left, channels, PIXELS, CHANNELS)
        b_similarity, p = _attend(b_own, b_text, scale, length, WORDS)
        p = tl.where(is_pixel, p, 0.0)
        b_attention += share * p
        p_dp = p * b_grad_attention
        ds = share * (p_dp - p * tl.sum(p_dp, 1)[:, None])
        tl.store(grad_share_ptr + i_sums + level, tl.sum(p_dp))
        tl.store(grad_scale_ptr + i_sums + level, tl.sum(ds * b_similarity))
        b_grad_similarity = (ds * scale).to(text_ptr.dtype.element_ty)
        b_grad_text += tl.dot(tl.trans(b_grad_similarity), b_own)
        first = (level * expressions + i_expression) * pixels + i_pixel
        _store_rows(grad_similarity_ptr, b_grad_similarity, first, left, WORDS, PIXELS, WORDS)
    b_attention = b_attention.to(text_ptr.dtype.element_ty)
    b_grad_absorbed = tl.dot(tl.trans(b_attention), b_grad)
    i_rows = (i_tile * expressions + i_expression) * words
    _store_rows(grad_text_ptr, b_grad_text, i_rows, words, channels, WORDS, CHANNELS)
    _store_rows(grad_absorbed_ptr, b_grad_absorbed, i_rows, words, channels, WORDS, CHANNELS)


@triton.jit(do_not_specialize=["images", "expressions", "words"])
def _image_backward_kernel(
    grad_ptr,  # (expressions, pixels, channels)
    features_ptr,  # (levels, images, pixels, channels)
    text_ptr,  # (expressions, words, channels)
    lengths_ptr,  # (expressions,) int64
    image_index_ptr,  # (expressions,) int64
    weight_ptr,  # (channels, 2 * channels)
    level_weights_ptr,  # (levels,)
    grad_similarity_ptr,  # (levels, expressions, pixels, WORDS)
    grad_features_ptr,  # (levels, images, pixels, channels), or None where it is not wanted
    grad_image_ptr,  # (images, pixels, channels), grad summed over the expressions of an image
    mixed_ptr,  # (images, pixels, channels), the levels' mixture
    grad_share_ptr,  # (tiles, images, levels) float32, through the mixture
    levels, images, expressions, pixels, words, channels,
    PIXELS: tl.constexpr, WORDS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of one image."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_pixel = i_tile * PIXELS
    image = tl.program_id(1).to(tl.int64)
    left = pixels - i_pixel
    b_grad = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for expression in range(expressions):
        if tl.load(image_index_ptr + expression) == image:
            first = i_pixel + expression * pixels
            b_own = _load_rows(grad_ptr, first, left, channels, PIXELS, CHANNELS)
            b_grad += b_own.to(tl.float32)
    i_rows = image * pixels + i_pixel
    _store_rows(grad_image_ptr, b_grad, i_rows, left, channels, PIXELS, CHANNELS)
    b_grad = b_grad.to(grad_ptr.dtype.element_ty)
    row, channel, word = tl.arange(0, PIXELS), tl.arange(0, CHANNELS), tl.arange(0, WORDS)
    b_grad_share = tl.zeros((LEVELS,), tl.float32)
    for start in range(0, CHANNELS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < channels
        inside = (row < left)[:, None] & is_column[None, :]
        p_weight = weight_ptr + channel[:, None] * (2 * channels) + column[None, :]
        m_weight = (channel < channels)[:, None] & is_column[None, :]
        b_weight = tl.load(p_weight, mask=m_weight, other=0.0)
        b_grad_mixed = tl.dot(b_grad, b_weight)
        b_mixed = tl.zeros((PIXELS, COLUMNS), tl.float32)
        for level in range(levels):
            share = tl.load(level_weights_ptr + level).to(tl.float32)
            first = (level * images + image) * pixels + i_pixel
            offset = (first + row)[:, None] * channels + column[None, :]
            b_own = tl.load(features_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            b_mixed += share * b_own
            sum_of_level = tl.sum(b_own * b_grad_mixed)
            b_grad_share += tl.where(tl.arange(0, LEVELS) == level, sum_of_level, 0.0)
            if grad_features_ptr is not None:
                b_grad_own = share * b_grad_mixed
                for expression in range(expressions):
                    if tl.load(image_index_ptr + expression) == image:
                        first = i_pixel + (level * expressions + expression) * pixels
                        b_grad_similarity = _load_rows(
                            grad_similarity_ptr, first, left, WORDS, PIXELS, WORDS
                        )
                        length = tl.load(lengths_ptr + expression)
                        p_text = text_ptr + column[None, :]
                        p_text += (expression * words + word)[:, None] * channels
                        m_text = (word < length)[:, None] & is_column[None, :]
                        b_text = tl.load(p_text, mask=m_text, other=0.0)
                        b_grad_own += tl.dot(b_grad_similarity, b_text)
                b_grad_own = b_grad_own.to(grad_features_ptr.dtype.element_ty)
                tl.store(grad_features_ptr + offset, b_grad_own, mask=inside)
        offset = (i_rows + row)[:, None] * channels + column[None, :]
        tl.store(mixed_ptr + offset, b_mixed.to(mixed_ptr.dtype.element_ty), mask=inside)
    level = tl.arange(0, LEVELS)
    p_share = grad_share_ptr + (i_tile * images + image) * levels + level
    tl.store(p_share, b_grad_share, mask=level < levels)
