"""`python -m benchmarks.end_to_end.frame --base COMMIT --out FILE`: the stages of a 720p frame, before and after.

Each stage by itself runs over the frames of a clip and is measured by the processor time of all threads, in milliseconds of one
core for each frame. Beside them stand the whole command's processor time, the difference of a long and a short clip so that its
start is left out, and its frames per second. COMMIT is checked out aside and measured by this same file, in turn with this tree.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.provenance import ROOT, collect

STAGE_FRAMES = 72
SHORT, LONG = 24, 264
ROUNDS = 3


def core_ms(work: Callable[[], Any], frames: int) -> tuple[float, Any]:
    """Processor time of all threads for each frame, and the result of the work."""
    started = time.process_time()
    result = work()
    return 1000 * (time.process_time() - started) / frames, result


def stages(clip: Path, expression: str) -> dict[str, float]:
    """Core-milliseconds of each stage of a frame."""
    import torch

    from refsam import RefSAM
    from refsam.video import draw_overlay, open_source
    from refsam_kernels import mask_postprocess

    model: Any = RefSAM.from_pretrained("nano").eval().optimize()
    found: dict[str, float] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        found[name], result = core_ms(work, STAGE_FRAMES)
        return result

    with open_source(clip) as source, torch.no_grad():
        reader = iter(source)
        frames = measured("decoding, RGB", lambda: [next(reader) for _ in range(STAGE_FRAMES)])
        images = [torch.from_numpy(frame.image)[None] for frame in frames]
        model.preprocess(images[0])
        prepared = measured("resize, normalise, pad", lambda: [model.preprocess(i) for i in images])
        size = prepared[0][1]
        model.encode_image(prepared[0][0])
        encoded = measured(
            "image encoder", lambda: [model.encode_image(pixels) for pixels, _ in prepared]
        )
        text = model.encode_text([expression])
        model.decode(encoded[0], text)
        measured("text", lambda: [model.encode_text([expression]) for _ in frames])
        outputs = measured("decoder", lambda: decode_all(model, encoded, text))
        masks = measured(
            "masks at the frame's size",
            lambda: [
                mask_postprocess(
                    output.logits,
                    image_size=model.image_size,
                    input_size=size.resized,
                    output_size=size.original,
                ).numpy()
                for output in outputs
            ],
        )
    pairs = list(zip(frames, masks, strict=True))
    caption = [f"{expression}   0.97"]
    measured("drawing", lambda: [draw_overlay(f.image, mask, caption) for f, mask in pairs])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        measured("PNG", lambda: write(out / "masks", expression, False, pairs))
        measured("all writing", lambda: write(out / "all", expression, True, pairs))
    found["H.264"] = found.pop("all writing") - found["PNG"] - found["drawing"]
    return found


def decode_all(model: Any, encoded: list[Any], text: Any) -> list[Any]:
    """The decoder's outputs, each with the track token of the one before."""
    outputs, track = [], None
    for image in encoded:
        outputs.append(model.decode(image, text, None, track))
        track = outputs[-1].track_token
    return outputs


def write(out: Path, expression: str, overlay: bool, pairs: list[tuple[Any, Any]]) -> None:
    """Everything that is written of these frames and masks."""
    import numpy as np

    from refsam.video import ResultWriter

    rate = Fraction(30)
    with ResultWriter(out, [expression], fps=rate, time_base=1 / rate, overlay=overlay) as writer:
        for frame, mask in pairs:
            writer.write(frame, mask, np.ones(1, np.float32))
        writer.finish()


def command(clip: Path, expression: str, out: Path) -> tuple[float, float]:
    """Core-seconds of `refsam segment`, and its frames per second."""
    words = [sys.executable, "-m", "refsam", "segment", str(clip), "--text", expression]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*words, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    timings = json.loads((out / "result.json").read_text(encoding="utf-8"))["timings"]
    return seconds, timings["frames_per_second"]


def measure(folder: Path, expression: str) -> dict[str, float]:
    """One round in the tree that is imported: stages, and the command as a whole."""
    row = stages(folder / "long.mp4", expression)
    with tempfile.TemporaryDirectory() as out:
        short, _ = command(folder / "short.mp4", expression, Path(out) / "short")
        long, rate = command(folder / "long.mp4", expression, Path(out) / "long")
    row["the whole command"] = 1000 * (long - short) / (LONG - SHORT)
    return row | {"frames per second": rate}


def measure_in(tree: Path, folder: Path, expression: str) -> dict[str, float]:
    """One round in a process of a tree; compiled libraries are this tree's."""
    libraries = os.environ.get("REFSAM_LIBRARIES", str(ROOT / "kernels" / "refsam_kernels"))
    paths = os.pathsep.join(map(str, (tree, tree / "kernels")))
    # Threads and memory as the command sets them on two cores, but without its modules for this, which old trees lack.
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    variables |= {"PYTHONPATH": paths, "REFSAM_LIBRARIES": libraries}
    words = [sys.executable, __file__, "--measure", str(folder), "--expression", expression]
    done = subprocess.run(
        words, cwd=tree, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(base: str) -> dict[str, list[dict[str, float]]]:
    """Rounds of the base and of this tree, in turn."""
    from benchmarks.end_to_end.segment import (
        write_clip,
    )  # old trees, which only measure, do not have it

    rounds: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        clips, tree = Path(folder), Path(folder) / "base"
        expression = write_clip(clips / "long.mp4", LONG)
        write_clip(clips / "short.mp4", SHORT)
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), base], cwd=ROOT, check=True
        )
        try:
            for _ in range(ROUNDS):
                rounds["before"].append(measure_in(tree, clips, expression))
                rounds["after"].append(measure_in(ROOT, clips, expression))
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True
            )
    return rounds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="commit that is called before")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--expression", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.expression)))
        return
    if not (arguments.base and arguments.out):
        parser.error("--base and --out are needed")
    origin = collect("cpu") | {"base": arguments.base}
    rounds = compare(arguments.base)
    medians = {
        side: {name: round(median(row[name] for row in rows), 2) for name in rows[0]}
        for side, rows in rounds.items()
    }
    for name, before in medians["before"].items():
        print(f"{name:28} {before:8.2f} {medians['after'][name]:8.2f}")
    content = {**origin, "medians": medians, "rounds": rounds}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
