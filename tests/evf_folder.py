"""A folder as EVF-SAM publishes it, tiny and with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from refsam.config import EVFConfig
from refsam.model import EVFSAM
from tests.test_evf_golden import TINY, evf_name

WORDS = "the a red blue dog cat cup on left right [semantic]".split()
CONFIG = {"hidden_size": 128, "out_dim": 256, "mm_extractor_scale": "base", "sam_scale": "huge"}
UNUSED = {
    "visual_model.prompt_encoder.not_a_point_embed.weight": (1, 256),
    "mm_extractor.beit3.vision_embed.mask_token": (1, 1, 128),
}


def tiny_evf_config() -> EVFConfig:
    """BEiT-3's heads are 64 wide, as in the published scales."""
    beit3 = TINY["beit3"] | {"width": 128, "depth": 2, "num_heads": 2, "hidden": 96}
    return EVFConfig(**TINY | {"beit3": beit3})  # type: ignore[arg-type]


def published_tensors() -> dict[str, Tensor]:
    """Every tensor of a tiny EVF-SAM under EVF-SAM's names."""
    torch.manual_seed(0)
    state = EVFSAM(tiny_evf_config()).state_dict()
    unused = {name: torch.zeros(shape) for name, shape in UNUSED.items()}
    return {evf_name(name): tensor for name, tensor in state.items()} | unused


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """A `tokenizer.json` of whole words with XLM-RoBERTa's special tokens."""
    vocabulary = [*("<s>", "<pad>", "</s>", "<unk>"), *words]
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_evf(folder: Path, weights: str = "safetensors", **config: object) -> Path:
    """The whole folder; weights: safetensors, sharded or bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_tokenizer(folder)
    tensors = {name: tensor.half() for name, tensor in published_tensors().items()}
    if weights == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif weights == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        write_shards(folder, tensors)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two files and their index."""
    names, places = list(tensors), {}
    for part in (0, 1):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
        places |= dict.fromkeys(names[part::2], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
