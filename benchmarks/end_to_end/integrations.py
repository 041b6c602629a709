"""`python -m benchmarks.end_to_end.integrations CASE...`: other libraries' models before and after `optimize()`, on the CPU.

Weights are random, of the real shapes. A model and its optimized copy are checked against each other, then called in turn.
Memory is the peak of a second call above all that lies there before it; packed copies of weights, which the first call leaves,
are a figure of their own. Both are measured in processes of their own. A training step in bfloat16 runs under autocast.
Rows are appended, one for times and one for memory; `--list` names the cases.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.encoder import DTYPES, features_of, largest_error
from benchmarks.end_to_end.products import products_of
from benchmarks.measure import peak_memory, resident, take_turns
from benchmarks.programs import in_new_process, make_parser
from refsam_kernels.integrations import optimize
from tests.kernels.encoder_models import cellpose, low_rank, of_transformers, processor_of
from tests.sam_modeling import sam_image_encoder

VIT_B: dict[str, Any] = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "window_size": 14,
    "out_chans": 256,
}
VIT_B.update(patch_size=16, global_attn_indexes=(2, 5, 8, 11))
VIT_L = VIT_B | {"embed_dim": 1024, "depth": 24, "num_heads": 16}
VITDET: dict[str, Any] = {
    "image_size": 1024,
    "use_relative_position_embeddings": True,
    "window_size": 14,
}
VITDET.update(window_block_indices=[0, 1, 3, 4, 6, 7, 9, 10])


@dataclass(frozen=True)
class Case:
    """A model, the side of the pixels that it takes, and whether a training step or a call is timed."""

    model: str
    make: Callable[[], Any]
    pixels: int
    task: str = "features"

    @property
    def trains(self) -> bool:
        """Whether a training step is timed."""
        return self.task == "training step"

    def cast(self, model: Any, dtype: torch.dtype) -> Any:
        """The model in a dtype; one that trains stays in float32, for autocast."""
        return model.to(dtype) if isinstance(model, nn.Module) and not self.trains else model


def got(pixels: int) -> Callable[[], nn.Module]:
    sizes = {"image_size": pixels}
    return of_transformers("got_ocr2", "GotOcr2VisionConfig", "GotOcr2VisionEncoder", sizes)


def deepseek(pixels: int, attention: str) -> Callable[[], nn.Module]:
    names = ("DeepseekOcr2SamVisionConfig", "DeepseekOcr2SamVisionEncoder")
    sizes = {"image_size": pixels, "downsample_channels": [512, 896]}
    return of_transformers("deepseek_ocr2", *names, sizes, attention)


FORMULA = ("pp_formulanet", "PPFormulaNetVisionConfig", "PPFormulaNetVisionModel")
TABLES = ("slanext", "SLANeXtVisionConfig", "SLANeXtVisionEncoder")

CASES = {
    "got-1024": Case("GOT-OCR2 (transformers, eager)", got(1024), 1024),
    "got-640": Case("GOT-OCR2 (transformers, eager)", got(640), 640),
    "deepseek-1024": Case("DeepSeek-OCR 2 (transformers, SDPA)", deepseek(1024, "sdpa"), 1024),
    "deepseek-640": Case("DeepSeek-OCR 2 (transformers, SDPA)", deepseek(640, "sdpa"), 640),
    "deepseek-eager-1024": Case("DeepSeek-OCR 2 (transformers, eager)", deepseek(1024, "eager"), 1024),
    "deepseek-eager-640": Case("DeepSeek-OCR 2 (transformers, eager)", deepseek(640, "eager"), 640),
    "formula": Case("PP-FormulaNet (transformers, eager)", of_transformers(*FORMULA, {"image_size": 512}), 512),
    "slanext": Case("SLANeXt (transformers, eager)", of_transformers(*TABLES, {"image_size": 512}), 512),
    "cellpose": Case("Cellpose-SAM, ViT-L (segment-anything)", partial(cellpose, 8, **VIT_L, img_size=1024), 256),
    "vitdet": Case("ViTDet-B (transformers, eager)", of_transformers("vitdet", "VitDetConfig", "VitDetModel", VITDET), 1024),
    "masks": Case("16 masks to 1080p (SAM 2's processor in transformers)", partial(processor_of, "sam2"), 256, "masks"),
    "lora": Case(
        "SAM ViT-B with LoRA (segment-anything)",
        lambda: low_rank(sam_image_encoder(**VIT_B, img_size=512)),
        512,
        "training step",
    ),
}  # fmt: skip


def masks_of(processor: Any) -> Tensor:
    """16 objects' logits to masks of a frame of 1080p."""
    logits = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = nn.functional.interpolate(logits, size=(256, 256), mode="bicubic")
    return processor.post_process_masks([logits], [(1080, 1920)])[0]


def call_of(case: Case, model: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The timed results: features of one image, the gradients of the adapters, or masks."""
    if case.task == "masks":
        return partial(masks_of, model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, case.pixels, case.pixels, generator=generator)
    if not case.trains:
        pixels = pixels.to(dtype)

    def features() -> Tensor:
        with torch.inference_mode():
            return features_of(model(pixels))

    def gradients() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = features_of(model(pixels))
        features.float().square().mean().backward()
        given = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(given)

    return gradients if case.trains else features


def measure(case: Case, dtype: str, rounds: int) -> dict[str, Any]:
    """The row of a case, without its memory. The calls that are compared are the warm-up."""
    plain = case.make()
    exact = call_of(case, plain, torch.float32)().float()
    plain = case.cast(plain, DTYPES[dtype])
    optimized = copy.deepcopy(plain)
    handle = optimize(optimized)
    models = {"before": plain, "after": optimized}
    calls = {name: call_of(case, model, DTYPES[dtype]) for name, model in models.items()}
    found = {"after": calls["after"]()}
    found["before"] = exact if dtype == "float32" else calls["before"]()
    times = take_turns(calls, rounds)
    row: dict[str, Any] = {name: asdict(each) for name, each in times.items()}
    speedup = times["before"].median_ms / times["after"].median_ms
    row |= {
        "speedup": speedup,
        "errors": {n: largest_error(x, exact) for n, x in found.items()},
        "replaced": repr(handle),
    }
    if case.task != "masks":
        row["products"] = asdict(products_of(calls["after"], DTYPES[dtype]))
    return row


def memory_of(name: str, dtype: str, which: str) -> dict[str, Any]:
    """Bytes above the weights in this process: a call's peak; of an optimized model's second one, and what the first left."""
    case = CASES[name]
    model = case.cast(case.make(), DTYPES[dtype])
    call = call_of(case, model, DTYPES[dtype])
    if which == "after":
        optimize(model)
    lying = resident("VmRSS")
    first = peak_memory(call, "cpu")
    if which == "before":
        return {"call": first, "kept": 0}
    second = peak_memory(call, "cpu")
    peak_memory(lambda: None, "cpu")  # gives freed memory back
    return {"first_call": first, "call": second, "kept": resident("VmRSS") - lying}


def main() -> int:
    """Measures cases and appends a JSON line for each."""
    parser = make_parser(__file__, __doc__, "models_cpu.jsonl")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--measure", choices=["time", "memory"], default="time")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
    for name in options.cases:
        case = CASES[name]
        labels = {"case": name, "model": case.model, "pixels": case.pixels, "task": case.task}
        row: dict[str, Any] = labels | {"dtype": options.dtype, "measured": options.measure}
        if options.measure == "time":
            row |= measure(case, options.dtype, options.rounds)
        else:
            row |= {
                w: in_new_process(memory_of, name, options.dtype, w) for w in ("before", "after")
            }
        row["provenance"] = options.origin
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in row if key != "provenance"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
