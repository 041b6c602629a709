"""The model card of a checkpoint folder: facts of the checkpoint, and fields for its owner to fill."""

from typing import Any

from refsam.checkpoint import Checkpoint
from refsam.config import RefSAMConfig

TEMPLATE = """---
{{ card_data }}
---

# {{ model_name | default("A RefSAM checkpoint", true) }}

Referring video object segmentation: give an expression and a video, and get the mask of the object that is meant, frame by
frame. RefSAM ([arXiv 2307.00997](https://arxiv.org/abs/2307.00997)) by [refsam](https://pypi.org/project/refsam).

```python
from refsam import RefSAM, segment_video

model = RefSAM.from_pretrained("{{ repo_id | default("THIS_REPOSITORY_OR_FOLDER", true) }}"{{ base_argument }})
for result in segment_video(model, "clip.mp4", ["the red cup"]):
    print(result.frame_index, result.masks.shape, result.scores)
```

| | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Training

{{ training | default("Not described yet: which data, how many steps, which configuration.", true) }}

## Results

{{ results | default("Not measured yet: `refsam evaluate --help` lists the benchmarks.", true) }}

## Limits

{{ limitations | default("Not described yet. An object that is not in view may still get a mask: see the scores.", true) }}
"""


def card_arguments(stored: Checkpoint) -> dict[str, Any]:
    """A checkpoint's own values for `TEMPLATE`, as arguments of the mixin's `generate_model_card`."""
    config, encoder = stored.config, stored.config.image_encoder
    assert isinstance(config, RefSAMConfig)
    count = sum(tensor.numel() for tensor in stored.tensors.values())
    facts = {
        "image encoder": f"{encoder.depth} blocks, {encoder.embed_dim} wide, {encoder.num_heads} heads, "
        f"image {encoder.image_size}, patch {encoder.patch_size}",
        "text encoder": _text_encoder(config.text_encoder),
        "parameters in the file": f"{count / 1e6:.1f} M",
    }
    if stored.kind == "delta":
        facts["built on"] = str(stored.sources["sam"])
    base = ', sam="PATH"' if stored.kind == "delta" else ""
    return {"facts": facts, "base_argument": base}


def _text_encoder(settings: Any) -> str:
    if settings.kind == "small":
        return f"its own, {settings.depth} layers, {settings.width} wide"
    return f"{settings.name}, not part of the file"
