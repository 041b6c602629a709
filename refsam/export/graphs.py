"""The graphs to export: two of a RefSAM, and those of an EVF-SAM."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from refsam.model import EVFSAM, PromptedSAM, RefSAM, TextPrompt
from refsam.model.features import ImageFeatures
from refsam.model.trunk_features import FINE_CHANNELS, name_channels
from refsam_kernels import decompositions

Model = TypeVar("Model", bound=PromptedSAM)


class Prompt(NamedTuple):
    """A `TextPrompt` for `RefSAM.decode` that does not trim itself on the host, which would fix a graph's sizes."""

    words: Tensor
    sentence: Tensor
    lengths: Tensor


class ImageEncoderGraph(nn.Module):
    """Normalised pixels (1, 3, S, S) to the maps (L, 1, N, C) that expressions attend to, and a trunk's maps."""

    def __init__(self, model: RefSAM) -> None:
        super().__init__()
        self.model = _with_parts(model, "image_encoder", "trunk", "dense_attention")

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """See `RefSAM.encode_image`; the embedding is the first level."""
        image = self.model.encode_image(pixels)
        if image.fine is None or image.names is None:
            return image.levels
        return image.levels, image.fine, image.names


class MaskDecoderGraph(nn.Module):
    """Feature maps, P encoded expressions and their track tokens to masks and the next track tokens."""

    def __init__(self, model: RefSAM) -> None:
        super().__init__()
        parts = ("prompt_encoder", "cross_modal_mlp", "dense_attention", "mask_decoder", "tracking")
        self.model = _with_parts(model, *parts, "noun_match", "outlines")
        self.side = model.image_size // model.config.image_encoder.patch_size

    def forward(
        self,
        levels: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        track: Tensor,
        has_track: Tensor,
        fine: Tensor | None = None,
        names: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `RefSAM.project_text` and `RefSAM.decode`.

        levels (L, 1, N, C), tokens (P, T, Ct) of the text encoder, lengths (P,) int64, track (P, C),
        has_track (P,) bool, and what the encoder gives of a trunk. Returns logits (P, 4h, 4w), iou (P,) and the next
        track (P, C).
        """
        words, sentence = self.model.cross_modal_mlp(tokens, lengths)
        prompt = Prompt(words, sentence, lengths)
        output = self.model.decode(
            ImageFeatures(levels[0], levels, (self.side, self.side), fine=fine, names=names),
            cast(TextPrompt, prompt),
            None,
            track,
            has_track,
        )
        return output.logits, output.iou, output.track_token


class EVFEncoderGraph(nn.Module):
    """Normalised pixels (1, 3, S, S) and the frame's view (1, 3, s, s) to features and patches of EVF-SAM."""

    def __init__(self, model: EVFSAM) -> None:
        super().__init__()
        self.model = _with_parts(model, "image_encoder", "beit3")

    def forward(self, pixels: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """See `EVFSAM.encode_image`: levels (1, 1, N, C) and patches (1, V, D)."""
        image = self.model.encode_image(pixels, view)
        assert image.patches is not None
        return image.levels, image.patches


class EVFMaskGraph(nn.Module):
    """EVF-SAM's features and P expressions as token ids to masks."""

    def __init__(self, model: EVFSAM) -> None:
        super().__init__()
        self.model = _with_parts(model, "prompt_encoder", "mask_decoder", "beit3", "text_mlp")
        self.side = model.image_size // model.config.image_encoder.patch_size

    def forward(
        self, levels: Tensor, patches: Tensor, ids: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """levels (1, 1, N, C), patches (1, V, D), ids (P, T) and lengths (P,) int64 to logits (P, 4h, 4w), iou (P,)."""
        words = self.model.beit3.embed_words(ids)
        prompt = Prompt(words, words[:, 0], lengths)
        image = ImageFeatures(levels[0], levels, (self.side, self.side), patches)
        output = self.model.decode(image, cast(TextPrompt, prompt))
        return output.logits, output.iou


def _with_parts(model: Model, *names: str) -> Model:
    """The same model with these parts only, shared: an exported program contains all weights of its module."""
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in names if name in model._modules}
    return part


@dataclass(frozen=True)
class Graph:
    """One graph before it is exported: its module, example inputs by name, names of the outputs.

    dynamic: the dimensions of each input whose size may vary, with the names of these sizes. limits: the smallest
    and the largest of such a size, if it is not 1 to any.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def export(self) -> torch.export.ExportedProgram:
        """The exported program, with refsam_kernels' operators replaced by their formulas."""
        names = sorted({name for sizes in self.dynamic.values() for name in sizes.values()})
        sizes = {name: self._dimension(name) for name in names}
        shapes = {
            name: {dim: sizes[size] for dim, size in self.dynamic.get(name, {}).items()}
            for name in self.inputs
        }
        with torch.no_grad(), quiet():
            program = torch.export.export(
                self.module, (), dict(self.inputs), dynamic_shapes=shapes, strict=False
            )
            return program.run_decompositions(decompositions())

    def _dimension(self, name: str) -> torch.export.Dim:
        smallest, largest = self.limits.get(name, (1, None))
        return torch.export.Dim(name, min=smallest, max=largest)

    def other_inputs(self) -> dict[str, Tensor]:
        """Inputs of the smallest sizes that it takes, to compare results with."""
        smaller = {}
        for name, tensor in self.inputs.items():
            for dim, size in self.dynamic.get(name, {}).items():
                tensor = tensor.narrow(dim, 0, self.limits.get(size, (1, 0))[0])
            words = self.limits.get("words", (1, 0))[0]
            smaller[name] = tensor.clamp_max(words) if name == "lengths" else tensor
        return smaller


def graphs_of(model: PromptedSAM) -> tuple[Graph, Graph]:
    """The two graphs of a model in eval mode on the CPU, with random example inputs."""
    if isinstance(model, EVFSAM):
        return _evf_graphs(model)
    assert isinstance(model, RefSAM)
    return _refsam_graphs(model)


def _evf_graphs(model: EVFSAM) -> tuple[Graph, Graph]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    side, beit3 = model.image_size // config.image_encoder.patch_size, config.beit3
    seen = 1 + (beit3.image_size // beit3.patch_size) ** 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames = {
        "pixels": random(1, 3, model.image_size, model.image_size),
        "view": random(1, 3, beit3.image_size, beit3.image_size),
    }
    features = {
        "levels": random(1, 1, side * side, config.prompt_dim),
        "patches": random(1, seen, beit3.width),
        "ids": torch.randint(4, beit3.vocabulary_size, (3, 5), generator=generator),
        "lengths": torch.tensor([5, 3, 4]),
    }
    sizes = {"ids": {0: "expressions", 1: "words"}, "lengths": {0: "expressions"}}
    limits = {"words": (2, model.beit3.max_tokens)}  # <s> and </s> at least
    return (
        Graph("image_encoder", EVFEncoderGraph(model), frames, ("levels", "patches"), {}),
        Graph("mask_decoder", EVFMaskGraph(model), features, ("logits", "iou"), sizes, limits),
    )


def _refsam_graphs(model: RefSAM) -> tuple[Graph, Graph]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = config.image_encoder.image_size // config.image_encoder.patch_size
    num_levels, width = len(model.dense_attention.level_logits), config.prompt_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels = {"pixels": random(1, 3, model.image_size, model.image_size)}
    trunk = {}
    if model.trunk is not None:
        fine = random(1, FINE_CHANNELS, 4 * side, 4 * side)
        names = name_channels(config.image_encoder.detector)
        trunk = {"fine": fine, "names": random(1, side * side, names)}
    encoder = Graph("image_encoder", ImageEncoderGraph(model), pixels, ("levels", *trunk), {})
    expressions, words = {0: "expressions"}, {0: "expressions", 1: "words"}
    decoder = Graph(
        "mask_decoder",
        MaskDecoderGraph(model),
        {
            "levels": nn.functional.normalize(random(num_levels, 1, side * side, width), dim=-1),
            "tokens": random(3, 5, config.text_encoder.width),
            "lengths": torch.tensor([5, 1, 3]),
            "track": random(3, width),
            "has_track": torch.tensor([True, False, True]),
            **trunk,
        },
        ("logits", "iou", "next_track"),
        {"tokens": words, "lengths": expressions, "track": expressions, "has_track": expressions},
    )
    return encoder, decoder


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages of torch's exporters about deprecations and packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
