"""OpenVINO's and ONNX Runtime's encoders: segment-anything's model exported for them, and how they are called.

Their packages are in the extra bench-cpu; without them every function raises ImportError.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

OPENVINO, ONNXRUNTIME = "OpenVINO", "ONNX Runtime"
MODELS = ONNX, FLOAT_MODEL, INT8_MODEL = "encoder.onnx", "encoder.xml", "encoder_int8.xml"
Encode = Callable[[Tensor], Tensor]


def file_of(name: str, dtype: str) -> str:
    """The model's file for a peer by name."""
    if name == ONNXRUNTIME:
        return ONNX
    return INT8_MODEL if dtype == "int8" else FLOAT_MODEL


def openvino_encoder(model: Path, dtype: str) -> Encode:
    """OpenVINO's compiled model; its float operations are in float32, or else in bfloat16, as is fastest beside int8."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda pixels: torch.from_numpy(compiled(pixels.numpy())[0])


def onnxruntime_encoder(model: Path, dtype: str) -> Encode:
    """ONNX Runtime's session, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])


def prepare(
    sam: nn.Module, pixels: Tensor, folder: Path, names: Iterable[str] = MODELS
) -> Iterator[str]:
    """Writes the models of segment-anything's encoder that are not there yet; yields what was left out, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = {ONNX: export_onnx, FLOAT_MODEL: export_openvino, INT8_MODEL: quantise}
    for name in names:
        if not (folder / name).is_file():
            try:
                writers[name](sam, pixels, folder / name)
            except ImportError as error:
                yield f"{name}: {error}"


def export_onnx(sam: nn.Module, pixels: Tensor, path: Path) -> None:
    """For ONNX Runtime."""
    torch.onnx.export(sam, (pixels,), path, dynamo=False, opset_version=17)


def export_openvino(sam: nn.Module, pixels: Tensor, path: Path) -> None:
    """For OpenVINO, with float32 weights."""
    import openvino

    model = openvino.convert_model(sam, example_input=pixels, input=[tuple(pixels.shape)])
    openvino.save_model(model, path, compress_to_fp16=False)


def quantise(sam: nn.Module, pixels: Tensor, path: Path) -> None:
    """For OpenVINO, by NNCF's post-training quantisation for transformers, calibrated on the one image."""
    import nncf
    import openvino

    model = openvino.Core().read_model(path.with_name(FLOAT_MODEL))
    images = nncf.Dataset([pixels.numpy()])
    kind = nncf.ModelType.TRANSFORMER
    quantised = nncf.quantize(model, images, model_type=kind, subset_size=1)
    openvino.save_model(quantised, path, compress_to_fp16=False)
