"""`python -m benchmarks.end_to_end.int8 --out FILE`: the image encoder on a CPU in each dtype, against OpenVINO and ONNX Runtime.

All share one set of random weights and are timed in turn. `--prepare FOLDER` first exports the peers' models;
OpenVINO's int8 is NNCF's, calibrated on the timed image. Without it, or without their packages (the extra bench-cpu),
peers are left out with the reason. Errors are relative to segment-anything in float32: the mean of the difference over
the mean size. Rows with `wide` are of a 16:9 frame of the same width without padding. Freed memory stays in the timed process,
as in `refsam segment`. Memory is that of a first call in a process of its own, above the weights; those of int8 replaced
the others. Rows of other models, sizes, threads and
instruction sets (REFSAM_CPU_INSTRUCTION_SET) stay in FILE.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.encoder import random_sam
from benchmarks.end_to_end.peers import (
    ONNXRUNTIME,
    OPENVINO,
    Encode,
    file_of,
    onnxruntime_encoder,
    openvino_encoder,
    prepare,
)
from benchmarks.measure import peak_memory, take_turns
from benchmarks.programs import MODELS, in_new_process, make_parser, milliseconds, write_rows
from benchmarks.provenance import collect
from refsam.config import RefSAMConfig
from refsam.model.build import build_image_encoder
from refsam.runtime.malloc import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
OURS = "refsam"


@dataclass(frozen=True)
class Provider:
    """One way to encode; `wide` frames are 16:9 without padding."""

    name: str
    dtype: str
    wide: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.name}, {self.dtype}{', 16:9' if self.wide else ''}"


PROVIDERS = (
    *(Provider(OURS, dtype) for dtype in DTYPES),
    *(Provider(OURS, dtype, wide=True) for dtype in DTYPES),
    *(Provider(OPENVINO, dtype) for dtype in DTYPES),
    Provider(ONNXRUNTIME, "float32"),
)


def make(provider: Provider, config: RefSAMConfig, sam: nn.Module, folder: Path | None) -> Encode:
    """The provider with segment-anything's weights: pixels (1, 3, h, w) float32 to (1, C, h / 16, w / 16)."""
    if provider.name == OURS:
        return make_ours(provider, config, sam)
    if folder is None:
        raise RuntimeError("no --prepare FOLDER with the peers' models")
    encode = onnxruntime_encoder if provider.name == ONNXRUNTIME else openvino_encoder
    return encode(folder / file_of(provider.name, provider.dtype), provider.dtype)


def make_ours(
    provider: Provider, config: RefSAMConfig, sam: nn.Module, *, release: bool = False
) -> Encode:
    """refsam's encoder around segment-anything's tensors."""
    encoder = build_image_encoder(config.override("image_encoder.adapter_ratio=0.0")).eval()
    encoder.load_state_dict(sam.state_dict(), strict=False, assign=True)
    encoder.optimize(DTYPES[provider.dtype], release_weights=release)
    return lambda pixels: encoder(pixels)[0].permute(0, 3, 1, 2)


def error_of(found: Tensor, exact: Tensor) -> float:
    """The mean size of the difference over that of the exact values."""
    return float((found.float() - exact).abs().mean() / exact.abs().mean())


def run_all(
    providers: list[Provider], config: RefSAMConfig, folder: Path | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row for each provider, timed in turn; a skipped one has its reason."""
    sam, pixels = seeded_sam(config), image(config)
    rows = round(pixels.shape[-1] * 9 / 16 / 16) * 16  # whole patches
    inputs = {False: pixels, True: pixels[:, :, :rows]}
    exact = {False: sam(pixels), True: None}
    calls, skipped, errors = {}, {}, {}
    for provider in providers:
        try:
            call = partial(make(provider, config, sam, folder), inputs[provider.wide])
            first = call()
        except Exception as error:  # a library that does not fit this machine can raise any error
            if provider.name == OURS:
                raise
            skipped[provider] = str(error).splitlines()[0]
            continue
        calls[provider.label] = call
        wanted = exact[provider.wide]
        errors[provider] = None if wanted is None else error_of(first, wanted)
    times = take_turns(calls, repeats)
    origin = collect("cpu") | {"threads": torch.get_num_threads()}
    for provider in providers:
        row = asdict(provider) | {"provenance": origin}
        if provider in skipped:
            yield row | {"skipped": skipped[provider]}
            continue
        yield row | {"error": errors[provider]} | asdict(times[provider.label])


def seeded_sam(config: RefSAMConfig) -> nn.Module:
    """segment-anything's encoder, its random weights always the same: the peers' models are of another process."""
    torch.manual_seed(0)
    return random_sam(config)


def image(config: RefSAMConfig) -> Tensor:
    """Normal noise in place of a normalised image (1, 3, S, S)."""
    side = config.image_encoder.image_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def first_call_bytes(provider: Provider, config: RefSAMConfig) -> int | None:
    """Bytes that a first call of ours needs at its peak in this process; None where they cannot be measured."""
    encode = make_ours(provider, config, seeded_sam(config), release=provider.dtype == "int8")
    return peak_memory(partial(encode, image(config)), "cpu")


def main() -> None:
    """Measures, prints and writes one JSON line for each provider."""
    parser = make_parser(__file__, __doc__, "int8_cpu.jsonl")
    parser.add_argument("--model", choices=MODELS, default="vit_b")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument(
        "--threads", type=int, help="of every provider; torch's choice if not given"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=(), metavar="LABEL", help="providers by label")
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="of the peers' models, written if missing"
    )
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument(
        "--memory", action="store_true", help="measure it too, in processes of their own"
    )
    options = parser.parse_args()
    config = RefSAMConfig.preset(options.model).override(
        f"image_encoder.image_size={options.image_size}"
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if options.prepare:
            for reason in prepare(seeded_sam(config), image(config), options.prepare):
                print(f"left out: {reason}", file=sys.stderr)
        if options.prepare_only:
            return
        keep_freed_memory()
        chosen = [p for p in PROVIDERS if not options.only or p.label in options.only]
        rows = list(run_all(chosen, config, options.prepare, options.repeats))
    for row in rows:
        provider = Provider(row["name"], row["dtype"], row["wide"])
        row |= {"model": options.model, "image_size": options.image_size}
        row |= {"threads": torch.get_num_threads(), "instruction_set": instruction_set()}
        if options.memory and provider.name == OURS and not provider.wide:
            row["peak_memory_bytes"] = in_new_process(first_call_bytes, provider, config)
        print(line_of(provider, row), flush=True)
    write_rows(options.out, [*other_rows(options.out, rows), *rows])


def instruction_set() -> str:
    """The one that our compiled kernels are told to use; empty for the best."""
    return os.environ.get("REFSAM_CPU_INSTRUCTION_SET", "")


def other_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file that the new ones do not replace."""
    if not path.is_file():
        return []
    fields = ("name", "dtype", "wide", "model", "image_size", "threads", "instruction_set")
    old = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    new = {tuple(row[field] for field in fields) for row in rows}
    return [row for row in old if tuple(row.get(field, "") for field in fields) not in new]


def line_of(provider: Provider, row: dict[str, Any]) -> str:
    """One row as a line to print."""
    if "skipped" in row:
        return f"{provider.label:32} skipped: {row['skipped']}"
    error = "" if row["error"] is None else f"error {100 * row['error']:.2f} %"
    memory = row.get("peak_memory_bytes")
    used = "" if memory is None else f"{memory / 2**20:.0f} MiB"
    return f"{provider.label:32} {milliseconds(row)}  {error}  {used}"


if __name__ == "__main__":
    main()
