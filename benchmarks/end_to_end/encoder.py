"""`python -m benchmarks.end_to_end.encoder --out FILE`: the image encoder on the CPU against its peers' encoders.

All share one set of random weights, and adapters are untrained: every result must be segment-anything's. Each dtype is a
group of its own: checked, timed in turn, checked again. Memory is that of a first call in a process of its own, packed
copies of the weights included, compilation excluded. A peer that cannot run here is skipped with a reason.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.peers import (
    ONNXRUNTIME,
    OPENVINO,
    export_onnx,
    export_openvino,
    file_of,
    onnxruntime_encoder,
    openvino_encoder,
)
from benchmarks.measure import peak_memory, take_turns
from benchmarks.programs import (
    add_sizes,
    in_new_process,
    make_parser,
    milliseconds,
    random_config,
    report_rows,
)
from benchmarks.registry import backends_of, unusable
from benchmarks.report.results import failure
from refsam.config import EVFConfig, RefSAMConfig
from refsam.model.build import build_image_encoder
from refsam_kernels import use_backend
from refsam_kernels.integrations import optimize
from tests.sam_modeling import sam_image_encoder
from tests.timm_modeling import timm_image_encoder

BASELINE, COMPILED, SDPA, TIMM = (
    "segment-anything",
    "segment-anything, torch.compile",
    "transformers, SDPA",
    "timm",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative to the largest value, in float32; in bfloat16 twice the error of segment-anything's own encoder.
TOLERANCE = 1e-4
NEGLIGIBLE = 1e-8
MEMORY_RUNS = 3
_TRANSFORMERS_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.",
    "blocks.": "layers.",
    ".norm": ".layer_norm",
    "neck.0.": "neck.conv1.",
    "neck.1.": "neck.layer_norm1.",
    "neck.2.": "neck.conv2.",
    "neck.3.": "neck.layer_norm2.",
}


@dataclass(frozen=True)
class Provider:
    """One way to encode; `backend` is that of our rel_pos_attention, "" for the automatic choice."""

    name: str
    dtype: str
    backend: str = ""
    packed: bool = False
    adapters: bool = False


def providers(dtype: str, device: str = "cpu") -> Iterator[Provider]:
    """The providers compared in one dtype, the baseline first."""
    yield Provider(BASELINE, dtype)
    yield Provider(COMPILED, dtype)
    yield Provider(SDPA, dtype)
    yield Provider(TIMM, dtype)
    if device == "cpu":
        yield Provider(OPENVINO, dtype)
    if device == "cpu" and dtype == "float32":
        yield Provider(ONNXRUNTIME, dtype)
    for backend in backends_of("rel_pos_attention", device):
        ours = f"refsam, {backend}"
        yield Provider(ours, dtype, backend, packed=True)
        yield Provider(f"{ours}, not packed", dtype, backend)
        yield Provider(f"{ours}, with adapters", dtype, backend, packed=True, adapters=True)
        for theirs in (BASELINE, SDPA, TIMM):
            yield Provider(f"{theirs}, optimize(), {backend}", dtype, backend)


def random_sam(config: RefSAMConfig | EVFConfig) -> nn.Module:
    """segment-anything's encoder with random weights."""
    sizes = config.image_encoder
    return sam_image_encoder(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        window_size=sizes.window_size,
        global_attn_indexes=sizes.global_blocks,
        out_chans=config.prompt_dim,
    )


def make(provider: Provider, config: RefSAMConfig, sam: nn.Module) -> Callable[[Tensor], Tensor]:
    """The provider with segment-anything's weights: pixels (1, 3, S, S) float32 to (1, C, h, w)."""
    dtype = DTYPES[provider.dtype]
    if provider.name in (OPENVINO, ONNXRUNTIME):
        return make_exported(provider, config, sam)
    if provider.name.startswith((BASELINE, SDPA, TIMM)):
        return make_theirs(provider, config, sam)
    ratio = config.image_encoder.adapter_ratio if provider.adapters else 0.0
    encoder = build_image_encoder(config.override(f"image_encoder.adapter_ratio={ratio}")).eval()
    encoder.load_state_dict(sam.state_dict(), strict=False, assign=True)
    draw_adapters(encoder)
    if provider.packed:
        encoder.optimize(dtype)
    lowered = dtype != torch.float32 and not provider.packed
    request = f"rel_pos_attention={provider.backend}" if provider.backend else ""

    def encode(pixels: Tensor) -> Tensor:
        autocast = torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=lowered)
        with use_backend(request), autocast:
            return encoder(pixels)[0].permute(0, 3, 1, 2)

    return encode


def make_exported(
    provider: Provider, config: RefSAMConfig, sam: nn.Module
) -> Callable[[Tensor], Tensor]:
    """Another runtime's encoder, exported into a temporary folder that is removed after it was loaded."""
    side = config.image_encoder.image_size
    export = export_onnx if provider.name == ONNXRUNTIME else export_openvino
    load = onnxruntime_encoder if provider.name == ONNXRUNTIME else openvino_encoder
    with TemporaryDirectory() as folder:
        path = Path(folder) / file_of(provider.name, provider.dtype)
        export(sam, torch.zeros(1, 3, side, side), path)
        return load(path, provider.dtype)


def draw_adapters(encoder: nn.Module) -> None:
    """Fills untrained adapters' zeros, which a GPU multiplies faster, with values that are too small to change a result."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("_Adapter.D_fc2.weight"):
                parameter.copy_(NEGLIGIBLE * torch.randn_like(parameter))


def make_theirs(
    provider: Provider, config: RefSAMConfig, sam: nn.Module
) -> Callable[[Tensor], Tensor]:
    """Another library's own encoder, made faster by `optimize` where a backend is named."""
    dtype = DTYPES[provider.dtype]
    model: Any = sam
    if not provider.name.startswith(BASELINE):
        of_library = timm_encoder if provider.name.startswith(TIMM) else transformers_encoder
        model = of_library(config, sam)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    if provider.name == COMPILED:
        model = torch.compile(model)
    if not provider.backend:
        return lambda pixels: features_of(model(pixels.to(dtype)))
    if model is sam:
        # Modules of its own, which optimize() may change, around the same weights.
        model = random_sam(config)
        model.load_state_dict(sam.state_dict(), assign=True)
    optimize(model)

    def encode(pixels: Tensor) -> Tensor:
        with use_backend(f"rel_pos_attention={provider.backend}"):
            return features_of(model(pixels.to(dtype)))

    return encode


def transformers_encoder(config: RefSAMConfig, sam: nn.Module) -> nn.Module:
    """transformers' SamVisionModel with SDPA and segment-anything's weights, which it shares."""
    from transformers import SamVisionConfig, SamVisionModel

    sizes = config.image_encoder
    settings = SamVisionConfig(
        hidden_size=sizes.embed_dim,
        output_channels=config.prompt_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        mlp_ratio=sizes.mlp_ratio,
        window_size=sizes.window_size,
        global_attn_indexes=list(sizes.global_blocks),
    )
    model = SamVisionModel._from_config(settings, attn_implementation="sdpa").eval()
    state = {}
    for name, tensor in sam.state_dict().items():
        for ours, theirs in _TRANSFORMERS_NAMES.items():
            name = name.replace(ours, theirs)
        state[f"vision_encoder.{name}"] = tensor
    model.load_state_dict(state, assign=True)
    return model


def timm_encoder(config: RefSAMConfig, sam: nn.Module) -> nn.Module:
    """timm's VisionTransformerSAM with segment-anything's weights, which it shares."""
    sizes = config.image_encoder
    model = timm_image_encoder(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_ratio,
        window_size=sizes.window_size,
        global_attn_indexes=sizes.global_blocks,
        neck_chans=config.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    state = {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in sam.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def features_of(output: Any) -> Tensor:
    """The features, whether a module returns them or an object that holds them."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def largest_error(found: Tensor, exact: Tensor) -> float:
    """The largest error of a result relative to the largest exact value."""
    return float((found.float() - exact).abs().max() / exact.abs().max())


def run_group(
    config: RefSAMConfig,
    sam: nn.Module,
    dtype: str,
    exact: Tensor,
    pixels: Tensor,
    repeats: int,
    only: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of one dtype: all providers, or the baseline and those named in `only`.

    A provider with a wrong result has `wrong` and no times.
    """
    wanted = {BASELINE, *only} if only else {provider.name for provider in providers(dtype)}
    compared = {p.name: p for p in providers(dtype) if p.name in wanted}
    calls, skipped = usable_calls(list(compared.values()), config, sam, pixels)
    before = {name: largest_error(call(), exact) for name, call in calls.items()}
    limit = TOLERANCE if dtype == "float32" else 2 * before[BASELINE]
    good = {name: call for name, call in calls.items() if before[name] <= limit}
    times = take_turns(good, repeats)
    after = {name: largest_error(call(), exact) for name, call in good.items()}
    for name, provider in compared.items():
        if name in skipped:
            yield {**asdict(provider), "skipped": skipped[name]}
            continue
        row = {**asdict(provider), "error": max(before[name], after.get(name, 0.0)), "limit": limit}
        if not row["error"] <= limit:
            yield row | {"wrong": f"error {row['error']:.1e}, at most {limit:.1e} is allowed"}
            continue
        memory = memory_of(provider, config)
        speedup = times[BASELINE].median_ms / times[name].median_ms
        yield row | asdict(times[name]) | {"speedup": speedup, "peak_memory_bytes": memory}


def usable_calls(
    compared: Sequence[Provider], config: RefSAMConfig, sam: nn.Module, pixels: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The functions that encode the pixels, by provider; a missing library or compiler gives its error instead."""
    calls: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    for provider in compared:
        encode = cache(partial(make, provider, config, sam))
        call = partial(encode_with, encode, pixels)
        needs_others = provider.name.startswith((COMPILED, SDPA, TIMM, OPENVINO, ONNXRUNTIME))
        reason = unusable(call) if needs_others else None
        if reason is None:
            calls[provider.name] = call
        else:
            skipped[provider.name] = reason
    return calls, skipped


@torch.inference_mode()
def encode_with(made: Callable[[], Callable[[Tensor], Tensor]], pixels: Tensor) -> Tensor:
    """The features of the pixels by an encoder that is made at the first call."""
    return made()(pixels)


def memory_of(provider: Provider, config: RefSAMConfig) -> int | None:
    """Bytes that a first call needs at its peak above the weights: the median of several processes, whose heaps vary."""
    found = [in_new_process(first_call_bytes, provider, config) for _ in range(MEMORY_RUNS)]
    known = [used for used in found if used is not None]
    return int(statistics.median(known)) if known else None


@torch.inference_mode()
def first_call_bytes(provider: Provider, config: RefSAMConfig) -> int | None:
    """Bytes of a first call in this process; None where they cannot be measured."""
    encode = make(provider, config, random_sam(config))
    size = config.image_encoder.image_size
    call = partial(encode, torch.zeros(1, 3, size, size))
    if provider.name == COMPILED:
        call()  # compiling takes more than computing
    return peak_memory(call, "cpu")


def main() -> int:
    """Measures, prints and writes one JSON line for each provider; returns 1 if a result was wrong."""
    parser = make_parser(__file__, __doc__, "encoder_cpu.jsonl")
    add_sizes(parser)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="providers by name; the baseline is always there",
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = random_config(options.model, options.image_size, options.depth)
    with torch.inference_mode():
        sam = random_sam(config)
        side = options.image_size
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        exact = sam(pixels)
        rows = (
            row
            for dtype in options.dtypes
            for row in run_group(config, sam, dtype, exact, pixels, options.repeats, options.only)
        )
        return report_rows(options, rows, table_line)


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    name = f"{row['dtype']:9} {row['name']:34}"
    if problem := failure(row):
        return f"{name} {problem}"
    memory = row["peak_memory_bytes"]
    used = "" if memory is None else f"{memory / 2**20:8.0f} MiB"
    times = f"{milliseconds(row)} {row['speedup']:5.2f}x"
    return f"{name} {times} {used}  error {row['error']:.1e}"


if __name__ == "__main__":
    sys.exit(main())
