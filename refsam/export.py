"""RefSAM for programs that run without it: two graphs, as `torch.export` programs and as ONNX.

`image_encoder` is run once per frame, `mask_decoder` once per frame for any number of expressions; the
track token goes out of one frame's call and into the next one's. What stands around them is the caller's:
resizing a frame as `refsam.model.preprocessing` does, the text encoder, resizing logits to masks.
"""

import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from refsam.errors import UserError
from refsam.model import RefSAM, TextPrompt
from refsam.model.features import ImageFeatures
from refsam_kernels import decompositions

FORMATS = ("onnx", "torch")
FACTS_FILE = "export.json"
OPSET = 20
# protobuf ends at 2 GiB; the graph itself needs some of that.
LARGEST_SINGLE_FILE = 1_900_000_000
# Of the largest value of an output: two orders of float32 sums through 32 blocks.
TOLERANCE = 1e-4
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


class Prompt(NamedTuple):
    """What `RefSAM.decode` reads of a `TextPrompt`, which trims itself on the host and so fixes a graph's sizes."""

    words: Tensor
    sentence: Tensor
    lengths: Tensor


class ImageEncoderGraph(nn.Module):
    """Normalised pixels (1, 3, S, S) to the feature maps (L, 1, N, C) that expressions attend to."""

    def __init__(self, model: RefSAM) -> None:
        super().__init__()
        self.model = _with_parts(model, "image_encoder", "dense_attention")

    def forward(self, pixels: Tensor) -> Tensor:
        """See `RefSAM.encode_image`; the embedding is the first level."""
        return self.model.encode_image(pixels).levels


class PromptAndMaskGraph(nn.Module):
    """Feature maps, P encoded expressions and their track tokens to masks and the next track tokens."""

    def __init__(self, model: RefSAM) -> None:
        super().__init__()
        parts = ("prompt_encoder", "cross_modal_mlp", "dense_attention", "mask_decoder", "tracking")
        self.model = _with_parts(model, *parts)
        self.side = model.image_size // model.config.image_encoder.patch_size

    def forward(
        self, levels: Tensor, tokens: Tensor, lengths: Tensor, track: Tensor, has_track: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `RefSAM.project_text` and `RefSAM.decode`.

        levels (L, 1, N, C), tokens (P, T, Ct) of the text encoder, lengths (P,) int64, track (P, C),
        has_track (P,) bool. Returns logits (P, 4h, 4w), iou (P,) and the next track (P, C).
        """
        words, sentence = self.model.cross_modal_mlp(tokens, lengths)
        prompt = Prompt(words, sentence, lengths)
        output = self.model.decode(
            ImageFeatures(levels[0], levels, (self.side, self.side)),
            cast(TextPrompt, prompt),
            None,
            track,
            has_track,
        )
        return output.logits, output.iou, output.track_token


def _with_parts(model: RefSAM, *names: str) -> RefSAM:
    """The same model with these parts only, shared: an exported program holds whatever its module does."""
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in names}
    return part


@dataclass(frozen=True)
class Graph:
    """One graph before it is exported: what computes it, example inputs by name, names of the outputs.

    dynamic: which dimensions of an input may have another size, and what those are called.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]

    def export(self) -> torch.export.ExportedProgram:
        """The program without any operator of refsam_kernels: their formulas stand in their place."""
        names = sorted({name for sizes in self.dynamic.values() for name in sizes.values()})
        sizes = {name: torch.export.Dim(name, min=1) for name in names}
        shapes = {
            name: {dim: sizes[size] for dim, size in self.dynamic.get(name, {}).items()}
            for name in self.inputs
        }
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                self.module, (), dict(self.inputs), dynamic_shapes=shapes, strict=False
            )
            return program.run_decompositions(decompositions())

    def other_inputs(self) -> dict[str, Tensor]:
        """Inputs of the smallest sizes that it takes, to compare results with."""
        smaller = {}
        for name, tensor in self.inputs.items():
            for dim in self.dynamic.get(name, {}):
                tensor = tensor.narrow(dim, 0, 1)
            smaller[name] = tensor.clamp_max(1) if name == "lengths" else tensor
        return smaller


def graphs_of(model: RefSAM) -> tuple[Graph, Graph]:
    """The two graphs of a model in eval mode on the CPU, with random example inputs."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = config.image_encoder.image_size // config.image_encoder.patch_size
    num_levels, width = len(model.dense_attention.level_logits), config.prompt_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels = {"pixels": random(1, 3, model.image_size, model.image_size)}
    encoder = Graph("image_encoder", ImageEncoderGraph(model), pixels, ("levels",), {})
    expressions, words = {0: "expressions"}, {0: "expressions", 1: "words"}
    decoder = Graph(
        "mask_decoder",
        PromptAndMaskGraph(model),
        {
            "levels": nn.functional.normalize(random(num_levels, 1, side * side, width), dim=-1),
            "tokens": random(3, 5, config.text_encoder.width),
            "lengths": torch.tensor([5, 1, 3]),
            "track": random(3, width),
            "has_track": torch.tensor([True, False, True]),
        },
        ("logits", "iou", "next_track"),
        {"tokens": words, "lengths": expressions, "track": expressions, "has_track": expressions},
    )
    return encoder, decoder


def export_model(
    model: RefSAM,
    out: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    check: bool = True,
    overwrite: bool = False,
    largest_single_file: int = LARGEST_SINGLE_FILE,
) -> dict[str, Any]:
    """Writes both graphs in each of these formats, and `export.json`, which says what is in them.

    A model whose weights are larger than `largest_single_file` bytes has them in `<name>.onnx.data` beside
    its ONNX graph. With `check` every file is run and compared with the model: the ONNX ones by ONNX
    Runtime on the CPU. Nothing remains of an export that fails.

    Args:
        model: in eval mode, on the CPU, float32.
        out: the folder to write.
        formats: of "onnx" and "torch".
        overwrite: replace an earlier export in that folder; other files there are left alone.

    Returns:
        What export.json holds.

    Raises:
        UserError: `out` exists or cannot be written, a package is missing, or a result differs by more
            than `TOLERANCE` of the largest value.
        ValueError: an unknown format, or a model in training mode, elsewhere than on the CPU or in
            another dtype.
    """
    out = Path(out)
    _check_arguments(model, formats)
    check_export(out, formats, check=check, overwrite=overwrite)
    facts = _facts_of(model)
    with _staging(out, overwrite) as folder:
        for graph in graphs_of(model):
            program, wanted = graph.export(), results_of(graph, graph.module)
            described = _describe(graph, wanted[0])
            for format_ in formats:
                path = folder / f"{graph.name}{_SUFFIXES[format_]}"
                _write(program, graph, path, largest_single_file)
                if check:
                    described[format_] = {"largest_difference": compare(graph, wanted, path)}
            facts["graphs"][graph.name] = described
        facts["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def check_export(out: Path, formats: Sequence[str], *, check: bool, overwrite: bool) -> None:
    """Raises UserError where the folder or a missing package forbids an export, before anything is computed."""
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; wanted a new folder, or --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, wanted a folder")
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if check else [])]
    missing = [name for name in needed if not find_spec(name)]
    if "onnx" in formats and missing:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}: pip install 'refsam[export]', or --format torch"
        )


def _check_arguments(model: RefSAM, formats: Sequence[str]) -> None:
    if not formats or set(formats) - set(FORMATS):
        raise ValueError(f"formats: got {list(formats)}, wanted some of {', '.join(FORMATS)}")
    if model.training:
        raise ValueError("model: got one in training mode, wanted eval() before it")
    if (model.device.type, model.dtype) != ("cpu", torch.float32):
        raise ValueError(f"model: got {model.device}, {model.dtype}, wanted cpu, torch.float32")


def _facts_of(model: RefSAM) -> dict[str, Any]:
    """What a program needs to know to run the graphs."""
    encoder = model.config.image_encoder
    return {
        "refsam": version("refsam"),
        "torch": torch.__version__,
        "opset": OPSET,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "text_encoder": model.config.text_encoder.kind,
        "tolerance": TOLERANCE,
        "graphs": {},
    }


def _describe(graph: Graph, results: Sequence[Tensor]) -> dict[str, Any]:
    """Names, shapes and dtypes of a graph's inputs and outputs; dimensions of any size by their names."""
    count = len(graph.inputs.get("lengths", ()))

    def shape(name: str, tensor: Tensor) -> list[int | str]:
        named = dict(graph.dynamic.get(name, {}))
        if name in graph.outputs and graph.dynamic:
            named = {0: "expressions"}
            assert tensor.shape[0] == count
        return [named.get(dim, size) for dim, size in enumerate(tensor.shape)]

    def entry(name: str, tensor: Tensor) -> dict[str, Any]:
        return {"shape": shape(name, tensor), "dtype": str(tensor.dtype).removeprefix("torch.")}

    outputs = dict(zip(graph.outputs, results, strict=True))
    return {
        "inputs": {name: entry(name, tensor) for name, tensor in graph.inputs.items()},
        "outputs": {name: entry(name, tensor) for name, tensor in outputs.items()},
    }


def _write(
    program: torch.export.ExportedProgram, graph: Graph, path: Path, largest_single_file: int
) -> None:
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with _quiet():
        exported = torch.onnx.export(
            program,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    _name_sizes(exported.model.graph, graph.dynamic)
    exported.save(str(path), external_data=size > largest_single_file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what torch's exporters say of themselves: deprecations, packages that are not installed."""
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


def _name_sizes(graph: Any, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Calls the sizes of an ONNX graph what we call them; the exporter has numbers for names."""
    names = {
        str(value.shape[dim]): size
        for value in graph.inputs
        for dim, size in dynamic.get(value.name, {}).items()
    }
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for dim, size in enumerate(value.shape or ()):
            if str(size) in names:
                value.shape[dim] = names[str(size)]


def results_of(graph: Graph, call: Any) -> list[Sequence[Tensor]]:
    """The outputs for the example inputs and for smaller ones."""
    with torch.no_grad():
        every = [call(**inputs) for inputs in (graph.inputs, graph.other_inputs())]
    return [(outputs,) if isinstance(outputs, Tensor) else outputs for outputs in every]


def compare(graph: Graph, wanted: Sequence[Sequence[Tensor]], path: Path) -> float:
    """How far a file's outputs are off, relative to each one's largest value; raises UserError if too far."""
    if path.suffix == ".pt2":
        found = results_of(graph, torch.export.load(path).module())
    else:
        session = import_module("onnxruntime").InferenceSession(
            str(path), providers=["CPUExecutionProvider"]
        )
        found = results_of(graph, lambda **inputs: _run(session, inputs))
    pairs = zip(sum(map(tuple, found), ()), sum(map(tuple, wanted), ()), strict=True)
    difference = max(float((ours - w).abs().max() / w.abs().max()) for ours, w in pairs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path.name}: results differ by {difference:.1e} of the largest value, at most {TOLERANCE} is "
            "allowed; nothing was written"
        )
    return difference


def _run(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


@contextmanager
def _staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `out` whose files take their place there at the end, the facts last."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
    try:
        yield folder
        if overwrite and out.exists():
            for path in _earlier(out):
                path.unlink()
        out.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == FACTS_FILE):
            path.replace(out / path.name)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _earlier(out: Path) -> list[Path]:
    """The files of an earlier export, the facts first: without them the others count as unfinished."""
    names = [f"{graph}{suffix}" for graph in ("image_encoder", "mask_decoder") for suffix in
             (".onnx", ".onnx.data", ".pt2")]  # fmt: skip
    return [out / name for name in (FACTS_FILE, *names) if (out / name).is_file()]
