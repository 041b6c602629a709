"""A RefSAM of some thousand random parameters with every part in place."""

import torch

from refsam import RefSAM, RefSAMConfig

CONFIG = {
    "image_encoder": {
        "image_size": 64,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "window_size": 3,
        "global_blocks": (1, 3),
    },
    "text_encoder": {"kind": "small", "width": 32, "depth": 1, "num_heads": 2},
    "dense_attention": {"initial_scale": 10.0},
    "mask_decoder": {"mlp_dim": 64, "iou_hidden_dim": 32, "num_heads": 4},
    "prompt_dim": 32,
    "tracking_hidden_dim": 64,
    "frozen": False,
}


def tiny_model(seed: int = 0) -> RefSAM:
    """The model in eval mode; larger weights than a new model's, so that every input matters."""
    torch.manual_seed(seed)
    model = RefSAM(RefSAMConfig.from_dict(CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_trunk_model(seed: int = 0, *changes: str) -> RefSAM:
    """The model with a trunk beside its encoder and frames that are padded to whole patches only."""
    torch.manual_seed(seed)
    changes = ("image_encoder.trunk_width=0.5", "image_encoder.padding=none", *changes)
    model = RefSAM(RefSAMConfig.from_dict(CONFIG).override(*changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Convolutional networks of many layers would blow up.
            if not name.startswith(("trunk.network.", "trunk.detector.")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_detecting_model(seed: int = 0) -> RefSAM:
    """The model with a trunk and a detector beside its encoder."""
    return tiny_trunk_model(seed, "image_encoder.detector=true")
