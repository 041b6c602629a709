"""RefSAM for programs that run without it: two graphs, as `torch.export` programs and as ONNX.

`image_encoder` is run once per frame, `mask_decoder` once per frame for any number of expressions; it returns the
track tokens that the next frame's call takes. The caller resizes frames as `refsam.model.preprocessing` does, encodes
the text, and resizes logits to masks.
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
