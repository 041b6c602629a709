"""Writes the graphs of a model as files, and compares what the files compute."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam.config import EVFConfig
from refsam.errors import UserError
from refsam.export.graphs import Graph, graphs_of, quiet
from refsam.model import PromptedSAM

FORMATS = ("onnx", "torch")
FACTS_FILE = "export.json"
OPSET = 20
# protobuf ends at 2 GiB; the graph itself needs some of that.
LARGEST_SINGLE_FILE = 1_900_000_000
# Relative to the largest value of an output: two orders of float32 sums through 32 blocks.
TOLERANCE = 1e-4
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def export_model(
    model: PromptedSAM,
    out: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    check: bool = True,
    overwrite: bool = False,
    largest_single_file: int = LARGEST_SINGLE_FILE,
) -> dict[str, Any]:
    """Write both graphs in each of these formats, and `export.json`, which describes them.

    Weights larger than `largest_single_file` bytes go into `<name>.onnx.data` beside the ONNX graph. With `check`
    every file is run and compared with the model (ONNX files by ONNX Runtime on the CPU). A failed export leaves
    no files.

    Args:
        model: in eval mode, on the CPU, float32.
        out: the folder to write.
        formats: of "onnx" and "torch".
        overwrite: replace an earlier export in that folder; other files there are left alone.

    Returns:
        The contents of export.json.

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
    """Raise UserError before any work if the folder cannot be used or a package is missing."""
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


def _check_arguments(model: PromptedSAM, formats: Sequence[str]) -> None:
    if not formats or set(formats) - set(FORMATS):
        raise ValueError(f"formats: got {list(formats)}, wanted some of {', '.join(FORMATS)}")
    if model.training:
        raise ValueError("model: got one in training mode, wanted eval() before it")
    if (model.device.type, model.dtype) != ("cpu", torch.float32):
        raise ValueError(f"model: got {model.device}, {model.dtype}, wanted cpu, torch.float32")


def _facts_of(model: PromptedSAM) -> dict[str, Any]:
    """Facts that a program needs to run the graphs."""
    encoder = model.config.image_encoder
    return {
        "refsam": version("refsam"),
        "torch": torch.__version__,
        "opset": OPSET,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "text_encoder": _text_encoder(model),
        "tolerance": TOLERANCE,
        "graphs": {},
    }


def _text_encoder(model: PromptedSAM) -> str:
    """Kind of the text encoder or tokenizer that expressions need: beit3, small, t5 or roberta."""
    return "beit3" if isinstance(model.config, EVFConfig) else model.config.text_encoder.kind


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
    with quiet():
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


def _name_sizes(graph: Any, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Give the dynamic sizes of an ONNX graph our names; the exporter numbers them."""
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
    """Error of each output of a file, relative to its largest value; raises UserError if it is too large."""
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
    """A hidden folder beside `out`, whose files are moved into `out` at the end, the facts last."""
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
