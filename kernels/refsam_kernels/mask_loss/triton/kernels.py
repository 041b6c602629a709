"""Triton kernels of mask_loss: losses from the low-resolution logits in one pass, their gradient by gathering.

The forward resizes a tile of the target in registers and leaves five sums per tile, which a second kernel adds up in their order.
The backward has one program per tile of low-resolution logits: it makes the gradient of every target pixel that the tile takes
part in and brings it together by two small products with the resizes' weights. No addition is atomic, and nothing of the
target's size is written.
"""

import triton
import triton.language as tl

from refsam_kernels.mask_postprocess.triton.kernels import resized_tile


@triton.jit
def probability_and_entropy(x, target):
    """Probability, probability of being wrong, and cross entropy of logits and targets."""
    small = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + small)
    probability = tl.where(x >= 0, 1.0, small) * share
    opposite = tl.where(x >= 0, small, 1.0) * share  # 1 - probability, not rounded to 0
    wrong = probability * (1.0 - target) + opposite * target
    # log(1 + small) as 2 artanh(s), s at most 1/3: seven terms leave 2e-8, and no logarithm near 1 is taken.
    s = small / (2.0 + small)
    s2 = s * s
    series = 1.0 / 11 + s2 * (1.0 / 13)
    series = 1.0 / 7 + s2 * (1.0 / 9 + s2 * series)
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * series))
    entropy = tl.maximum(x, 0.0) - x * target + 2.0 * s * series
    return probability, wrong, entropy


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x ** EXPONENT of x >= 0; whole exponents that losses use are products."""
    if EXPONENT == 0:
        return x * 0.0 + 1.0
    elif EXPONENT == 1:
        return x
    elif EXPONENT == 2:
        return x * x
    else:
        return tl.exp2(EXPONENT * tl.log2(tl.maximum(x, 1.1754944e-38)))


@triton.jit
def target_tile(targets, ignore, ys, xs, height, width, HAS_IGNORE: tl.constexpr):
    """Targets (Y, X) of one mask and which of them count; where they do not, the target is 0."""
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    offset = ys.to(tl.int64)[:, None] * width + xs[None, :]
    if HAS_IGNORE:
        inside = inside & (tl.load(ignore + offset, mask=inside, other=1) == 0)
    target = tl.load(targets + offset, mask=inside, other=0).to(tl.float32)
    return target, inside


@triton.jit(do_not_specialize=["height", "width"])
def _sums_kernel(
    logits,  # (P, 4h, 4w) float32
    targets,  # (P, H, W)
    ignore,  # (P, H, W) uint8, or anything
    partial,  # (P, tiles, 5) float32
    row_start, row_weights, column_start, column_weights, low_height, low_width, height, width,
    alpha,
    GAMMA: tl.constexpr, HAS_IGNORE: tl.constexpr, ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    i_mask, i_tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tiles_x = tl.cdiv(width, BLOCK_X)
    ys = i_tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    xs = i_tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    x = resized_tile(
        logits + i_mask * low_height * low_width, low_width, row_start, row_weights, height,
        column_start, column_weights, width, ys, xs, height, width, ROW_TAPS, COLUMN_TAPS,
    )  # fmt: skip
    o_mask = i_mask * height * width
    target, counts = target_tile(
        targets + o_mask, ignore + o_mask, ys, xs, height, width, HAS_IGNORE
    )
    probability, wrong, entropy = probability_and_entropy(x, target)
    focal = (1.0 - alpha + (2.0 * alpha - 1.0) * target) * power(wrong, GAMMA) * entropy
    probability = tl.where(counts, probability, 0.0)
    store = partial + (i_mask * tl.num_programs(0) + i_tile) * 5
    tl.store(store, tl.sum(tl.sum(tl.where(counts, focal, 0.0), axis=1), axis=0))
    tl.store(store + 1, tl.sum(tl.sum(probability * target, axis=1), axis=0))
    tl.store(store + 2, tl.sum(tl.sum(probability, axis=1), axis=0))
    tl.store(store + 3, tl.sum(tl.sum(target, axis=1), axis=0))
    tl.store(store + 4, tl.sum(tl.sum(counts.to(tl.float32), axis=1), axis=0))


@triton.jit
def column_sum(partial, tiles, BLOCK: tl.constexpr):
    """The sum of every fifth of `tiles` numbers, in a fixed order."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i.to(tl.int64) * 5, mask=i < tiles, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["masks", "tiles"])
def _losses_kernel(
    partial,  # (P, tiles, 5) float32
    focal,  # (P,) float32
    dice,  # (P,) float32
    sums,  # (4, P) float32
    masks, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_mask = tl.program_id(0).to(tl.int64)
    partial += i_mask * tiles * 5
    intersection = column_sum(partial + 1, tiles, BLOCK)
    probabilities = column_sum(partial + 2, tiles, BLOCK)
    inside = column_sum(partial + 3, tiles, BLOCK)
    pixels = column_sum(partial + 4, tiles, BLOCK)
    tl.store(focal + i_mask, column_sum(partial, tiles, BLOCK) / tl.maximum(pixels, 1.0))
    tl.store(dice + i_mask, 1.0 - (2.0 * intersection + 1.0) / (probabilities + inside + 1.0))
    tl.store(sums + i_mask, intersection)
    tl.store(sums + masks + i_mask, probabilities)
    tl.store(sums + 2 * masks + i_mask, inside)
    tl.store(sums + 3 * masks + i_mask, pixels)


@triton.jit
def weights_tile(start, weights, stride, outputs, inputs, count, TAPS: tl.constexpr):
    """The resize's matrix (outputs, inputs) of one axis, a dense part of it."""
    inside = outputs < count
    distance = inputs[None, :] - tl.load(start + outputs, mask=inside, other=0)[:, None]
    matrix = tl.zeros([outputs.shape[0], inputs.shape[0]], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        weight = tl.load(weights + tap * stride + outputs, mask=inside, other=0.0)
        matrix += tl.where(distance == tap, weight[:, None], 0.0)
    return matrix


@triton.jit(do_not_specialize=["masks", "height", "width"])
def _gradient_kernel(
    grad_focal,  # (P,) float32
    grad_dice,  # (P,) float32
    logits,  # (P, 4h, 4w) float32
    targets,  # (P, H, W)
    ignore,  # (P, H, W) uint8, or anything
    sums,  # (4, P) float32
    grad,  # (P, 4h, 4w) float32
    row_start, row_weights, row_first, row_behind, column_start, column_weights, column_first,
    column_behind, masks, low_height, low_width, height, width, alpha,
    GAMMA: tl.constexpr, HAS_IGNORE: tl.constexpr, ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr, PART_Y: tl.constexpr,
    PART_X: tl.constexpr,
):  # fmt: skip
    i_mask, i_tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tiles_x = tl.cdiv(low_width, LOW_X)
    top, left = i_tile // tiles_x * LOW_Y, i_tile % tiles_x * LOW_X
    low_ys, low_xs = top + tl.arange(0, LOW_Y), left + tl.arange(0, LOW_X)
    intersection = tl.load(sums + i_mask)
    denominator = tl.load(sums + masks + i_mask) + tl.load(sums + 2 * masks + i_mask) + 1.0
    of_focal = tl.load(grad_focal + i_mask) / tl.maximum(tl.load(sums + 3 * masks + i_mask), 1.0)
    of_dice = tl.load(grad_dice + i_mask) / denominator
    outside = of_dice * (2.0 * intersection + 1.0) / denominator

    logits += i_mask * low_height * low_width
    targets += i_mask * height * width
    ignore += i_mask * height * width
    first_y, first_x = tl.load(row_first + top), tl.load(column_first + left)
    behind_y = tl.load(row_behind + tl.minimum(top + LOW_Y, low_height) - 1)
    behind_x = tl.load(column_behind + tl.minimum(left + LOW_X, low_width) - 1)
    total = tl.zeros([LOW_Y, LOW_X], dtype=tl.float32)
    for y in range(first_y, behind_y, PART_Y):
        ys = y + tl.arange(0, PART_Y)
        gathered = tl.zeros([PART_Y, LOW_X], dtype=tl.float32)
        for part in range(first_x, behind_x, PART_X):
            xs = part + tl.arange(0, PART_X)
            x = resized_tile(
                logits, low_width, row_start, row_weights, height, column_start, column_weights,
                width, ys, xs, height, width, ROW_TAPS, COLUMN_TAPS,
            )  # fmt: skip
            target, counts = target_tile(targets, ignore, ys, xs, height, width, HAS_IGNORE)
            probability, wrong, entropy = probability_and_entropy(x, target)
            slope = probability * (1.0 - probability)
            focal = wrong * (probability - target)
            if GAMMA != 0:
                wrong = tl.maximum(wrong, 1.1754944e-38)
                focal += GAMMA * (1.0 - 2.0 * target) * slope * entropy
                focal *= power(wrong, GAMMA - 1.0)
            else:
                focal = probability - target
            focal *= 1.0 - alpha + (2.0 * alpha - 1.0) * target
            grad_x = of_focal * focal + slope * (outside - 2.0 * of_dice * target)
            grad_x = tl.where(counts, grad_x, 0.0)
            matrix = weights_tile(
                column_start, column_weights, width, xs, low_xs, width, COLUMN_TAPS
            )
            gathered = tl.dot(grad_x, matrix, gathered)
        matrix = weights_tile(row_start, row_weights, height, ys, low_ys, height, ROW_TAPS)
        total = tl.dot(tl.trans(matrix), gathered, total)
    inside = (low_ys < low_height)[:, None] & (low_xs < low_width)[None, :]
    offset = i_mask * low_height * low_width + low_ys[:, None] * low_width + low_xs[None, :]
    tl.store(grad + offset, total, mask=inside)
