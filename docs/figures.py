"""`python docs/figures.py`: draws docs/images/kernels/*.svg, one picture per operator, from the table below.

Left, what goes in; in the middle, what one call computes; right, what comes out; below, what the
fused backends do without.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parent / "images" / "kernels"
INK, INPUT, INSIDE, OUTPUT = "#263238", "#e3f2fd", "#fff8e1", "#e8f5e9"
LINE = 0.62  # inches per formula


class Figure(NamedTuple):
    """One operator: tensors as (formula, shape), steps as formulas, and what other implementations keep."""

    inputs: list[tuple[str, str]]
    steps: list[str]
    output: tuple[str, str]
    absent: str


FIGURES = {
    "rel_pos_attention": Figure(
        [(r"$q, k, v$", "(B, h, w, 3D)"), (r"$R^h, R^w$", "(2S-1, head dim)"), (r"$b_{qkv}$", "(3D,)")],
        [
            r"$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}} + q_i \cdot R^h_{y_i - y_j} + q_i \cdot R^w_{x_i - x_j}$",
            r"$k_j, v_j = b_k, b_v$   where $j$ is padding of a window",
            r"$p_{ij} = \frac{\exp s_{ij}}{\sum_m \exp s_{im}}$",
            r"$o_i = \sum_j p_{ij}\, v_j$",
        ],
        (r"$o$", "(B, h, w, D)"),
        "scores and bias of all pairs (N x N per head), padded copies of windows",
    ),
    "adapter_projection": Figure(
        [(r"$a$", "(B, h, w, D)"), (r"$r$", "residual"), (r"$W, b$", "projection")],
        [
            r"$y = W a + b$",
            r"$y' = y + W_2\,\mathrm{gelu}(W_1 y + b_1) + b_2$",
            r"$x = r + y'$",
            r"$n = \frac{x - \mu(x)}{\sqrt{\sigma^2(x) + \epsilon}} \gamma + \beta$",
        ],
        (r"$x,\; n$", "(B, h, w, D) each"),
        "separate passes for bias, adapter, residual and norm",
    ),
    "adapter_mlp": Figure(
        [(r"$n$", "normed (B, h, w, D)"), (r"$r$", "residual"), (r"$W, V$", "MLP and adapter")],
        [
            r"$m = W_2\,\mathrm{gelu}(W_1 n + b_1) + b_2$",
            r"$a = V_2\,\mathrm{gelu}(V_1 n + c_1) + c_2$",
            r"$x = r + m + \frac{1}{2}\, a$",
            r"$n' = \mathrm{LayerNorm}(x)$",
        ],
        (r"$x,\; n'$", "(B, h, w, D) each"),
        "the sums between the steps; in inference, the hidden values of all tokens",
    ),
    "dense_attention": Figure(
        [(r"$F_l$", "(L, B, N, C)"), (r"$T$", "(P, T, C)"), (r"$W = [W_1\, W_2]$", "(C, 2C)")],
        [
            r"$A_l = \mathrm{softmax}(s\, F_l T^\top)$",
            r"$V = T\, W_2^\top$",
            r"$M = \sum_l \alpha_l F_l$",
            r"$\mathrm{dense} = M W_1^\top + (\sum_l \alpha_l A_l)\, V + b \sum_l \alpha_l$",
        ],
        (r"$\mathrm{dense}$", "(P, N, C)"),
        "the concatenation [F ; A T] (2C wide), one map per level and expression",
    ),
    "token_image_attention": Figure(
        [(r"$x$", "queries (P, Tq, C)"), (r"$z$", "keys (P, Tk, C)"), (r"$e_x, e_z$", "positions")],
        [
            r"$q = W_q (x + e_x),\quad k = W_k (z + e_z),\quad v = W_v\, z$",
            r"$a = \mathrm{softmax}(q\, k^\top / \sqrt{d})\, v$   (keys up to their length)",
            r"$y = x + W_o\, a + b_o$",
            r"$\mathrm{LayerNorm}(y)$",
        ],
        (r"$x'$", "like the queries"),
        "sums with positions, scores of all pairs, the attention before its projection",
    ),
    "int8_linear": Figure(
        [(r"$x$", "(..., in)"), (r"$W_1, W_2$", "int8, scales $s_1, s_2$"), (r"$r$", "residual")],
        [
            r"$q(x) = \mathrm{round}(x / \Delta) + z$   (range and step $\Delta$ of each row)",
            r"$h = \Delta s_1 (q(\mathrm{LayerNorm}(x)) - z)\, W_1^\top + b_1$",
            r"$y = r + \Delta' s_2 (q(\mathrm{gelu}(h)) - z')\, W_2^\top + b_2$",
        ],
        (r"$y$", "(..., out)"),
        "the normalised rows, the hidden values and the bytes of all rows",
    ),
    "mask_upscale": Figure(
        [(r"$f$", "(P, h, w, C)"), (r"$g_m$", "(P, M, C/8)"), (r"$K_1, K_2$", "2 x 2, stride 2")],
        [
            r"$u = \mathrm{gelu}(\mathrm{LayerNorm}(f \ast^\top K_1 + b_1))$",
            r"$v = \mathrm{gelu}(u \ast^\top K_2 + b_2)$",
            r"$\mathrm{logit}_m(y, x) = g_m \cdot v(y, x)$",
        ],
        (r"$\mathrm{logits}$", "(P, M, 4h, 4w)"),
        "the upscaled features: (C/4, 2h, 2w) and (C/8, 4h, 4w) per expression",
    ),
    "mask_loss": Figure(
        [(r"$z$", "logits (P, 4h, 4w)"), (r"$t$", "targets (P, H, W)"), (r"ignore", "(P, H, W)")],
        [
            r"$\hat z = \mathrm{resize}_{H \times W}(\mathrm{crop}(\mathrm{resize}_{S \times S}(z))),\quad p = \sigma(\hat z)$",
            r"$\mathrm{focal} = -\mathrm{mean}\; \alpha_t (1 - p_t)^\gamma \log p_t$",
            r"$\mathrm{dice} = 1 - \frac{2 \sum p\, t + 1}{\sum p + \sum t + 1}$",
        ],
        (r"focal, dice", "(P,) each"),
        "logits, probabilities and their gradients at full size",
    ),
    "mask_postprocess": Figure(
        [(r"$z$", "logits (P, 4h, 4w)"), ("sizes", "of image, input, frame")],
        [
            r"$\hat z = \mathrm{resize}_{H \times W}(\mathrm{crop}(\mathrm{resize}_{S \times S}(z)))$",
            r"$m = \hat z > \theta$",
            r"area, box and stability from the same pass",
        ],
        (r"$m$", "bool, bits or COCO RLE"),
        "logits at the image's or the frame's size",
    ),
}  # fmt: skip


def draw(figure: Figure) -> pyplot.Figure:
    """The picture of one operator."""
    rows = max(len(figure.steps), len(figure.inputs))
    height = LINE * rows + 0.95
    canvas, axes = pyplot.subplots(figsize=(10, height))
    axes.set(xlim=(0, 10), ylim=(0, height))
    axes.axis("off")
    middle = 0.65 + LINE * rows / 2
    _box(axes, 2.35, 0.6, 5.5, LINE * rows + 0.2, INSIDE)
    for place, step in zip(_spread(middle, len(figure.steps), rows), figure.steps, strict=True):
        axes.text(5.1, place, step, ha="center", va="center", color=INK, fontsize=13)
    for place, tensor in zip(_spread(middle, len(figure.inputs), rows), figure.inputs, strict=True):
        _tensor(axes, 0.05, place, tensor, INPUT)
        _arrow(axes, 1.95, 2.35, place)
    _arrow(axes, 7.85, 8.2, middle)
    _tensor(axes, 8.2, middle, figure.output, OUTPUT)
    note = f"not kept in memory by the fused backends: {figure.absent}"
    axes.text(5.1, 0.25, note, ha="center", va="center", color=INK, fontsize=9, style="italic")
    canvas.subplots_adjust(0, 0, 1, 1)
    return canvas


def _spread(middle: float, count: int, rows: int) -> list[float]:
    step = LINE * rows / count
    return [middle + step * ((count - 1) / 2 - index) for index in range(count)]


def _tensor(axes: Axes, left: float, middle: float, tensor: tuple[str, str], colour: str) -> None:
    _box(axes, left, middle - 0.26, 1.75, 0.52, colour)
    axes.text(
        left + 0.87, middle + 0.1, tensor[0], ha="center", va="center", color=INK, fontsize=11
    )
    axes.text(
        left + 0.87, middle - 0.14, tensor[1], ha="center", va="center", color=INK, fontsize=7.5
    )


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, style, facecolor=colour, edgecolor=INK, lw=0.8
        )
    )


def _arrow(axes: Axes, left: float, right: float, height: float) -> None:
    ends = (left, height), (right, height)
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=10, color=INK, lw=0.8))


def main() -> None:
    """Draw all of them; the same table gives the same files."""
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "refsam", "mathtext.fontset": "dejavuserif"})
    OUT.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        canvas = draw(figure)
        canvas.savefig(OUT / f"{name}.svg", metadata={"Date": None, "Creator": None})
        pyplot.close(canvas)


if __name__ == "__main__":
    main()
