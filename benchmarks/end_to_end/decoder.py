"""`python -m benchmarks.end_to_end.decoder --out FILE.jsonl`: segment-anything's mask decoder before and after `optimize()`.

`optimize()` is timed with its attentions between tokens and pixels as the original's, and as `token_image_attention`: `FASTER` of
refsam_kernels/integrations/two_way_transformer.py follows from the rows. Times are processor time of one thread, the ways in
turn, so that other work of the machine is not in them.
"""

import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import take_turns
from benchmarks.programs import make_parser
from refsam_kernels.integrations import optimize, two_way_transformer
from tests.sam_modeling import sam_mask_decoder

ROUNDS = 3
SIZES = ("64x7", "1x7", "1x20", "1x21", "1x32", "2x7", "2x21", "2x32", "4x7", "4x21", "4x32")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = Callable[[], tuple[Tensor, Tensor]]


def measure(prompts: int, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Medians in milliseconds of each way on an image of 64 x 64 tokens; `tokens` are those of the transformer."""
    decoder: Any = sam_mask_decoder(dim=256, mlp_dim=2048).to(dtype)
    inputs = {
        "image_embeddings": torch.randn(1, 256, 64, 64, dtype=dtype),
        "image_pe": torch.randn(1, 256, 64, 64, dtype=dtype),
        "sparse_prompt_embeddings": torch.randn(prompts, tokens - 5, 256, dtype=dtype),
        "dense_prompt_embeddings": torch.randn(1, 256, 1, 1, dtype=dtype).expand(
            prompts, -1, 64, 64
        ),
    }

    def optimized(by_operator: bool) -> float:
        chosen = mock.patch.object(two_way_transformer, "is_faster", return_value=by_operator)
        with optimize(decoder, check=False), chosen:
            return seconds()

    def seconds() -> float:
        start = time.thread_time()
        decoder(**inputs, multimask_output=True)
        return time.thread_time() - start

    ways: dict[str, Callable[[], float]] = {
        "original_ms": seconds,
        "attention_as_there_ms": lambda: optimized(False),
        "attention_as_operator_ms": lambda: optimized(True),
    }
    times = take_turns(ways, ROUNDS, lambda way: way())
    return {name: round(each.median_ms, 1) for name, each in times.items()}


def main() -> None:
    """Measures, and adds a row for each size to the file."""
    torch.set_num_threads(1)
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="PROMPTSxTOKENS")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        prompts, tokens = map(int, size.split("x"))
        with torch.inference_mode():
            times = measure(prompts, tokens, DTYPES[arguments.dtype])
        row = {"dtype": arguments.dtype, "prompts": prompts, "tokens": tokens} | times
        print(row, flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row | {"provenance": arguments.origin}) + "\n")


if __name__ == "__main__":
    main()
