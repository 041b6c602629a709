"""The models that `optimize` is tested with; others are found by their structure, too."""

from typing import NamedTuple


class Served(NamedTuple):
    """A model, its classes, and which parts of it are replaced."""

    model: str
    classes: str
    parts: str


_ENCODER = "image encoder"
_MASKS = "mask decoder's upscaling, masks"
_SAM = f"{_ENCODER}, {_MASKS}"

MODELS = (
    Served("segment-anything, MedSAM", "Sam, SamPredictor, SamAutomaticMaskGenerator, ImageEncoderViT, MaskDecoder", _SAM),
    Served("SAM-HQ, EVF-SAM, micro-sam (copies)", "Sam with a decoder of its own, ImageEncoderViT with LoRA layers", _ENCODER),
    Served("SAM in transformers", "SamModel, SamVisionModel, SamMaskDecoder, SamProcessor, SamImageProcessor", _SAM),
    Served("SAM-HQ in transformers", "SamHQModel, SamHQVisionModel, SamHQProcessor", "image encoder, masks"),
    Served("SAM 2 (sam2 and copies)", "SAM2Base, SAM2VideoPredictor, SAM2ImagePredictor, SAM2AutomaticMaskGenerator", _MASKS),
    Served("SAM 2 in transformers", "Sam2Model, Sam2VideoModel, Sam2Processor, Sam2VideoProcessor", _MASKS),
    Served("SAM 3's tracker in transformers", "Sam3TrackerModel, Sam3TrackerVideoModel, their processors", _MASKS),
    Served("EdgeTAM in transformers", "EdgeTamModel, EdgeTamVideoModel", "mask decoder's upscaling"),
    Served("GOT-OCR2", "GotOcr2*; its own code (vary_b.py)", _ENCODER),
    Served("DeepSeek-OCR, DeepSeek-OCR 2", "DeepseekOcr2*; its own code (sam_vary_sdpa.py)", _ENCODER),
    Served("DeepSeek-VL hybrid", "DeepseekVLHybrid*", "image encoder of high resolution"),
    Served("Unlimited-OCR", "UnlimitedOcr*", _ENCODER),
    Served("PP-FormulaNet", "PPFormulaNet*", _ENCODER),
    Served("SLANeXt", "SLANeXt*", _ENCODER),
    Served("Cellpose-SAM", "Transformer", _ENCODER),
    Served("SegGPT", "SegGpt*", "attention, MLP"),
    Served("ViTDet in transformers", "VitDetModel, VitDetBackbone, with relative positions", _ENCODER),
    Served("ViTDet in detectron2", "ViT, with relative positions", _ENCODER),
    Served("timm", "VisionTransformerSAM", _ENCODER),
    Served("MobileSAM", "its MaskDecoder", "mask decoder's upscaling"),
)  # fmt: skip
