"""Segment many videos with the processes of torchrun; finished videos are skipped.

    torchrun --nproc-per-node 2 examples/many_videos.py videos/*.mp4 --text "the red car" --out out
    python examples/many_videos.py videos/*.mp4 --text "the red car" --out out       # one process

Each video gets a folder as `refsam segment` writes it. One that cannot be read does not stop the others; a run that
was killed is continued by starting it again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from refsam import RefSAM
from refsam.runtime.device import choose_device
from refsam.session import Shard, VideoOutcome, segment_videos


def main(arguments: Sequence[str] | None = None) -> int:
    """Segments this process's videos; returns 1 if a video could not be segmented."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--text", action="append", required=True, help="what to segment; repeat it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--batch-size", type=int, default=1, help="frames encoded together")
    options = parser.parse_args(arguments)
    model = RefSAM.from_pretrained(options.checkpoint).to(choose_device("auto"))
    rank = Shard.from_environment().rank

    def report(outcome: VideoOutcome) -> None:
        state = outcome.problem or ("done earlier" if outcome.was_done else "done")
        print(f"process {rank}: {outcome.source}: {outcome.frames} frames, {state}", flush=True)

    outcomes = segment_videos(
        model,
        options.videos,
        options.text,
        options.out,
        batch_size=options.batch_size,
        advance=report,
    )
    return int(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
