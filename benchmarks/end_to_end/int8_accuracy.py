"""`python -m benchmarks.end_to_end.int8_accuracy DAVIS --out FILE`: how 8-bit integers in the image encoder change results.

By block: the error on one image relative to float32, of the block alone, which is handed float32's tokens, and of all
blocks up to it; for random weights and for nano. Of nano's answers: the scores of the first `--clips` frozen clips and
of one frame in `--every` of four DAVIS sequences (see `davis`): with the encoder in float32 and in int8, and in float32 with
frames filled up to squares, which nano was not trained on. Two processes of one thread each share these.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.end_to_end import davis
from benchmarks.end_to_end.encoder import random_sam
from benchmarks.end_to_end.int8 import image
from benchmarks.programs import make_parser, write_result
from refsam.config import RefSAMConfig
from refsam.evaluation.runners.generated import evaluate_generated
from refsam.model import RefSAM, SmallTextEncoder
from refsam.model.block import Block
from refsam.model.build import build_image_encoder
from refsam.model.image_encoder import ImageEncoder
from refsam.model.packing import arrange_block
from refsam.model.trunk_features import GREY

SQUARE = "float32, squares"
DTYPES = {"float32": torch.float32, "int8": torch.int8, SQUARE: torch.float32}


def errors_by_block(
    encoder: ImageEncoder, pixels: Tensor, added: Tensor | None = None
) -> list[dict[str, float]]:
    """One row for each block: the norm of what int8 changes over that of what the block adds, and of the tokens."""
    exact = encoder.patch_embed(pixels)
    exact = exact + encoder.position_table(*exact.shape[1:3])
    exact = exact if added is None else exact + added
    through, rows = exact, []
    for index, block in enumerate(cast(list[Block], encoder.blocks)):
        in_integers = arrange_block(block, torch.int8)
        after, _ = block(exact, block.norm1(exact), None)
        alone, _ = in_integers(exact, None, None)
        through, _ = in_integers(through, None, None)
        change = float((alone - after).norm() / (after - exact).norm())
        total = float((through - after).norm() / after.norm())
        rows.append({"block": index, "alone": change, "up_to_it": total})
        exact = after
    return rows


def random_encoder(name: str, image_size: int) -> tuple[ImageEncoder, Tensor]:
    """A preset's encoder with segment-anything's tensors drawn at random, and an image."""
    config = RefSAMConfig.preset(name).override(
        f"image_encoder.image_size={image_size}", "image_encoder.adapter_ratio=0.0"
    )
    encoder = build_image_encoder(config).eval()
    encoder.load_state_dict(random_sam(config).state_dict(), strict=False, assign=True)
    return encoder, image(config)


def nano_with(padding: str) -> RefSAM:
    """The bundled model, which fills frames up as this says."""
    nano = RefSAM.from_pretrained("nano").eval()
    if nano.config.image_encoder.padding == padding:
        return nano
    config = nano.config.override(f"image_encoder.padding={padding}")
    encoder = nano.text_encoder
    assert isinstance(encoder, SmallTextEncoder)
    other = RefSAM(config, encoder.tokenizer).eval()
    other.load_state_dict(nano.state_dict())
    return other


def answers(folder: Path, clips: int, every: int, name: str) -> dict[str, Any]:
    """nano's scores on DAVIS and on frozen clips in one of DTYPES."""
    torch.set_num_threads(1)
    nano = nano_with("square" if name == SQUARE else "none").optimize(DTYPES[name])
    rows = davis.score(nano, folder, every)
    generated = evaluate_generated(nano, clips)["summary"]
    return {"davis": {"summary": davis.summary(rows), "rows": rows}, "generated": generated}


def main() -> None:
    """Measures, prints and writes one JSON object."""
    parser = make_parser(__file__, __doc__, "int8_accuracy.json")
    parser.add_argument(
        "folder", type=Path, metavar="DAVIS", help="as benchmarks.end_to_end.davis takes it"
    )
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--every", type=int, default=1, help="of DAVIS, one frame in so many")
    parser.add_argument("--image-size", type=int, default=512, help="of the random encoder")
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "clips": options.clips,
        "every": options.every,
        "image_size": options.image_size,
    }
    with torch.inference_mode():
        result["vit_b, random weights"] = errors_by_block(
            *random_encoder("vit_b", options.image_size)
        )
        print(json.dumps(result), flush=True)
        nano = RefSAM.from_pretrained("nano").eval()
        frame = davis.Image.open(sorted((options.folder / "dog").glob("*.jpg"))[0]).convert("RGB")
        pixels, _ = nano.preprocess(torch.from_numpy(davis.np.array(frame))[None])
        assert nano.trunk is not None
        seen = nano.trunk((pixels * nano.pixel_std + nano.pixel_mean - GREY) / GREY)
        result["nano"] = errors_by_block(nano.image_encoder, pixels, seen.added)
        print(json.dumps(result["nano"]), flush=True)
    measure = partial(answers, options.folder, options.clips, options.every)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for name, found in zip(DTYPES, pool.map(measure, DTYPES), strict=True):
            print(name, json.dumps(found), flush=True)
            result[name] = found
    write_result(options, result)


if __name__ == "__main__":
    main()
