"""`python -m benchmarks.end_to_end.training --out FILE`: a training step on the CPU against one on segment-anything's modules.

A step is forward, backward, clipping and AdamW on one clip with one expression, as in stage 2. Both models have the same weights.
On segment-anything's modules encoder and decoder are its own, adapters stand around its layers, and the rest is plain
PyTorch; that is measured with autograd through everything, and with the frozen parts frozen as ours are.
Losses and gradients must agree before and after the timing; learning rate 0 keeps the weights. Each one's memory is that of its
first step in a process of its own: above the weights (gradients and the optimiser's state count), and of the whole process.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.end_to_end.encoder import random_sam
from benchmarks.end_to_end.per_expression import adapted_blocks, plain_decoder
from benchmarks.measure import peak_memory, resident, take_turns
from benchmarks.ops import mask_loss
from benchmarks.programs import (
    add_sizes,
    encoder_sizes,
    in_new_process,
    make_parser,
    milliseconds,
    write_result,
)
from benchmarks.report.results import failure
from refsam.config import config_from_dict
from refsam.data.clips import ClipBatch
from refsam.model import RefSAM
from refsam.training.batches import TrainingBatch
from refsam.training.module import TrainingModule
from refsam.training.optim import clip_gradients
from refsam.training.settings import TrainingSettings

BASELINE = "segment-anything, autograd through everything"
FROZEN = "segment-anything, frozen parts frozen"
OURS, CHECKPOINTED = "refsam", "refsam, activation checkpointing"
PROVIDERS = (BASELINE, FROZEN, OURS, CHECKPOINTED)
# Relative: of the loss, and of the trained parameters' gradients as one vector.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
TEXT = "the red cup on the left"
FRAME = (360, 640)


class SegmentAnythingStep(nn.Module):
    """The losses that `TrainingModule` computes, on segment-anything's modules with the weights of a RefSAM."""

    def __init__(self, ours: TrainingModule, *, freeze: bool) -> None:
        super().__init__()
        self.ours = ours
        model = ours.model
        with torch.device("meta"):
            self.encoder: Any = random_sam(model.config)
            self.decoder: Any = plain_decoder(model)
        # It shares the memory: otherwise a process would hold the weights twice.
        state = model.image_encoder.state_dict()
        self.encoder.load_state_dict(state, strict=False, assign=True)
        self.encoder.requires_grad_(not freeze)
        self.decoder.load_state_dict(model.mask_decoder.state_dict(), assign=True)
        self.decoder.requires_grad_(True)
        self.decoder.transformer.register_forward_hook(self._keep_tokens)
        self.hidden: Tensor
        self.levels: list[Tensor] = []
        self.encoder.blocks = nn.ModuleList(adapted_blocks(self.encoder, model))
        for index in model.image_encoder.intermediate_blocks:
            self.encoder.blocks[index].register_forward_hook(self._keep_level)

    def _keep_tokens(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        self.hidden = output[0]

    def _keep_level(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.levels.append(output)

    def forward(self, batch: TrainingBatch, stage: Any) -> dict[str, Tensor]:
        """As `TrainingModule`, for one clip and one expression."""
        model = self.ours.model
        pixels, size = model.preprocess(batch.clips.frames[0])
        self.levels = []
        features = self.encoder(pixels).permute(0, 2, 3, 1)
        embedding = F.normalize(features.flatten(1, 2), dim=-1)
        levels = model.dense_attention.project(embedding, self.levels)
        text = self.ours._encode_text(batch.clips.texts[0])
        words = torch.cat([text.sentence[:, None], text.words], dim=1)
        grid = features.shape[1:3]
        position = model.prompt_encoder.pe_layer(*grid).mT.unflatten(2, grid)
        track, losses = None, []
        for time in range(stage.frames):
            image = (levels[0, time] + self._dense(levels[:, time], words[0])).mT.unflatten(1, grid)
            sparse = text.words if track is None else torch.cat([text.words, track[:, None]], dim=1)
            masks, _ = self.decoder.predict_masks(image[None], position, sparse, torch.zeros(()))
            token = self.hidden[:, 1]
            track = model.tracking(token, track)
            truth = batch.clips.masks[0, :, time]
            sizes: Any = {"image_size": model.image_size, "input_size": size.resized}
            focal, dice = mask_loss.eager(masks[:, 0], truth, **sizes)
            losses.append(focal + dice)
        return {"total": torch.cat(losses).mean()}

    def _dense(self, levels: Tensor, words: Tensor) -> Tensor:
        """Dense prompts (N, C) of levels (L, N, C) and words (T, C), the sentence among them (paper, section 3.4)."""
        attention = self.ours.model.dense_attention
        weight, bias = attention.conv.parameters()
        share = (levels @ words.T * attention.log_scale.exp()).softmax(-1)
        dense = F.linear(torch.cat([levels, share @ words], dim=-1), weight.flatten(1), bias)
        return (attention.level_logits.softmax(0)[:, None, None] * dense).sum(0)


def training_settings(options: argparse.Namespace) -> TrainingSettings:
    """One stage of clips with one expression; the text encoder is the small one, frozen, so that nothing is downloaded."""
    values = {
        "model": {
            "preset": options.model,
            "image_encoder": encoder_sizes(options.image_size, options.depth),
            "text_encoder": {"kind": "small"},
        },
        "output": "",
        "stages": [{"steps": 1, "clips": 1, "frames": options.frames, "expressions": 1}],
        "loss": {"focal": 1.0, "dice": 1.0},
    }
    return config_from_dict(TrainingSettings, values)


def make_module(options: argparse.Namespace) -> TrainingModule:
    """Ours, with random weights everywhere, so that every part matters."""
    settings = training_settings(options)
    torch.manual_seed(0)
    module = TrainingModule(RefSAM(settings.architecture), settings)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module.train()


def make_batch(frames: int) -> TrainingBatch:
    """One clip of noise with a rectangle as its truth."""
    height, width = FRAME
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (1, frames, *FRAME, 3), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(1, 1, frames, *FRAME, dtype=torch.bool)
    masks[..., height // 4 : 2 * height // 3, width // 3 : 2 * width // 3] = True
    return TrainingBatch(ClipBatch(pixels, masks, (FRAME,), ((TEXT,),), None, ("noise",)))


class Step:
    """One provider's training step."""

    def __init__(self, name: str, module: TrainingModule, batch: TrainingBatch) -> None:
        self.module: nn.Module = module
        if name in (BASELINE, FROZEN):
            self.module = SegmentAnythingStep(module, freeze=name == FROZEN).train()
        self.activation_checkpointing = name == CHECKPOINTED
        self.encoder = module.model.image_encoder
        self.batch, self.stage = batch, module.settings.stages[0]
        # Adapters, decoder, dense attention, MLP, tracking; segment-anything's decoder in the place of ours.
        parameters = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
        decoder = getattr(self.module, "decoder", module.model.mask_decoder)
        parameters |= {f"mask_decoder.{n}": p for n, p in decoder.named_parameters()}
        self.trained = [parameters[name] for name in sorted(parameters)]
        self.optimiser = torch.optim.AdamW(self.trained, lr=0.0, fused=True)

    def losses(self) -> Tensor:
        """Forward and backward; the loss."""
        self.encoder.activation_checkpointing = self.activation_checkpointing
        self.module.zero_grad(set_to_none=True)
        total = self.module(self.batch, self.stage)["total"]
        total.backward()
        return total.detach()

    def __call__(self) -> Tensor:
        total = self.losses()
        clip_gradients(self.trained, 1.0)
        self.optimiser.step()
        self.module.zero_grad(set_to_none=True)
        return total

    def gradients(self) -> Tensor:
        """Those of all that is trained as one vector, zeros where there is none."""
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        return torch.cat([row.flatten() for row in rows])


def check(steps: dict[str, Step]) -> dict[str, str]:
    """The error of a provider's loss or gradients against the baseline, in words, by its name."""
    wrong = {}
    exact, direction = steps[BASELINE].losses(), steps[BASELINE].gradients()
    steps[BASELINE].module.zero_grad(set_to_none=True)
    for name in PROVIDERS[1:]:
        step = steps[name]
        loss = step.losses()
        off = float((loss - exact).abs() / exact.abs())
        turned = float((step.gradients() - direction).norm() / direction.norm())
        step.module.zero_grad(set_to_none=True)
        if not (off <= LOSS_TOLERANCE and turned <= GRADIENT_TOLERANCE):
            wrong[name] = f"loss off by {off:.1e}, gradients by {turned:.1e}"
    return wrong


def measure(
    options: argparse.Namespace, memory: Callable[[str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each provider; a wrong one has no times."""
    module, batch = make_module(options), make_batch(options.frames)
    steps = {name: Step(name, module, batch) for name in PROVIDERS}
    wrong = check(steps)
    good = [name for name in steps if name not in wrong]
    times = take_turns({name: steps[name] for name in good}, options.repeats)
    wrong = check(steps) | wrong
    rows = []
    for name in PROVIDERS:
        row: dict[str, Any] = {"name": name}
        if name in wrong:
            rows.append(row | {"wrong": wrong[name]})
            continue
        median = times[name].median_ms
        row |= asdict(times[name]) | {"steps_per_second": 1e3 / median} | memory(name)
        rows.append(row | {"speedup": times[BASELINE].median_ms / median})
    return rows


def first_step_bytes(options: argparse.Namespace, name: str) -> dict[str, int | None]:
    """Bytes of a first step, and of the whole process, in this one; None where they cannot be measured."""
    step = Step(name, make_module(options), make_batch(options.frames))
    used = peak_memory(step, "cpu")
    whole = None if used is None else resident("VmHWM")
    return {"step_memory_bytes": used, "process_memory_bytes": whole}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__file__, __doc__, "training_cpu.json")
    add_sizes(parser, image_size=512)
    parser.add_argument("--frames", type=int, default=3, help="of the clip")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(arguments)


def main() -> int:
    """Measures, prints and writes one JSON file; returns 1 if a result was wrong."""
    options = parse()
    names = ("model", "image_size", "frames", "depth")
    content: dict[str, Any] = {name: getattr(options, name) for name in names}
    content["rows"] = rows = measure(options, partial(in_new_process, first_step_bytes, options))
    for row in rows:
        print(table_line(row))
    write_result(options, content)
    return int(any("wrong" in row for row in rows))


def table_line(row: dict[str, Any]) -> str:
    """One row as a line to print."""
    name = f"{row['name']:46}"
    if problem := failure(row):
        return f"{name} {problem}"
    memory = row["step_memory_bytes"]
    used = "" if memory is None else f"{memory / 2**20:8.0f} MiB"
    return f"{name} {milliseconds(row)} {row['speedup']:5.2f}x {used}"


if __name__ == "__main__":
    sys.exit(main())
