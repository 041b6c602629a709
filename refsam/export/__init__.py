"""RefSAM for programs that run without it: two graphs, as `torch.export` programs and as ONNX.

`image_encoder` is run once per frame, `mask_decoder` once per frame for any number of expressions; the
track token goes out of one frame's call and into the next one's. What stands around them is the caller's:
resizing a frame as `refsam.model.preprocessing` does, the text encoder, resizing logits to masks.
"""

from refsam.export.files import FACTS_FILE, FORMATS, TOLERANCE, check_export, export_model
from refsam.export.graphs import Graph, graphs_of

__all__ = [
    "FACTS_FILE",
    "FORMATS",
    "TOLERANCE",
    "Graph",
    "check_export",
    "export_model",
    "graphs_of",
]
