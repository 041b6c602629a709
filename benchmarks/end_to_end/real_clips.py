"""`python -m benchmarks.end_to_end.real_clips FOLDER --before COMMIT --out FILE`: `nano` on two real clips, before and now.

FOLDER holds dog.mp4 (a woman in blue trousers and a dog) and blocks.mp4 (letter blocks in four colours on a black mat, hands);
the clips are not part of the project, their SHA-256 stands in the result. The objects of an expression are found by hue and
cleaned by morphology: J against them says whether a model marks the coloured things, not how exactly. Every eighth frame is seen.
"""

import subprocess
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import av
import numpy as np
from matplotlib.colors import rgb_to_hsv
from scipy import ndimage

from benchmarks.programs import make_parser, write_result
from benchmarks.report.results import markdown
from refsam.checkpoint.files import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, file_sha256
from refsam.metrics import region_similarity
from refsam.model import RefSAM
from refsam.session import VideoSession

ROOT = Path(__file__).parents[2]
STRIDE = 8
_WEIGHTS = Path("refsam/weights/nano")
_SMALLEST = 600  # pixels; a smaller piece of a block is what a hand leaves uncovered

# Hue in degrees (from, to), the least saturation and value in 0..1, and whether only the largest region counts.
_HUES = {
    "blue trousers": ((200, 235), 0.4, 0.12, True),
    "red": ((345, 10), 0.6, 0.4, False),
    "yellow": ((42, 65), 0.5, 0.5, False),
    "green": ((95, 160), 0.4, 0.3, False),
    "blue": ((205, 235), 0.5, 0.35, False),
}
# Meaning of each expression; None: nothing in the clip.
EXPRESSIONS: dict[str, dict[str, str | None]] = {
    "dog": {
        "the blue trousers": "blue trousers",
        "the blue jeans": "blue trousers",
        "the blue object": "blue trousers",
        "the navy thing": "blue trousers",
        "the purple circle": None,
        "the pink object": None,
        "the cyan heart": None,
        "the yellow square": None,
        "the orange star": None,
    },
    "blocks": {
        "the red squares": "red",
        "the yellow squares": "yellow",
        "the green squares": "green",
        "the blue squares": "blue",
        "the red objects": "red",
        "all red things": "red",
        "the yellow objects": "yellow",
        "the green things": "green",
        "the blue things": "blue",
        "the purple square": None,
        "the purple object": None,
        "the cyan circle": None,
        "the orange heart": None,
        "the pink star": None,
        "the orange object": None,
        "the pink object": None,
        "the cyan object": None,
        "the purple thing": None,
    },
}


def coloured(frame: np.ndarray, name: str) -> np.ndarray:
    """(H, W) bool: where the frame, (H, W, 3) uint8 RGB, has that colour, holes filled and specks left out."""
    (low, high), saturation, value, largest_only = _HUES[name]
    hue, frame_saturation, frame_value = np.moveaxis(rgb_to_hsv(frame / 255), 2, 0)
    mask = (360 * hue - low) % 360 < (high - low) % 360
    mask &= (frame_saturation > saturation) & (frame_value > value)
    mask = ndimage.binary_closing(ndimage.binary_opening(mask), iterations=8)
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = ndimage.sum(mask, labels, range(1, count + 1))
    kept = [np.argmax(sizes) + 1] if largest_only else np.flatnonzero(sizes > _SMALLEST) + 1
    return ndimage.binary_fill_holes(np.isin(labels, kept))


def score(model: RefSAM, folder: Path) -> list[dict[str, Any]]:
    """A row per expression: J, or the share of the frame marked where it means nothing; means over the frames."""
    rows = []
    for clip, meanings in EXPRESSIONS.items():
        session = VideoSession(model, list(meanings))
        found: dict[str, list[float]] = {expression: [] for expression in meanings}
        for frame in _frames(folder / f"{clip}.mp4"):
            truth = {name: coloured(frame, name) for name in set(meanings.values()) if name}
            for (expression, name), mask in zip(
                meanings.items(), np.asarray(session.step(frame).masks), strict=True
            ):
                if name is None:
                    found[expression].append(float(mask.mean()))
                elif truth[name].any():
                    found[expression].append(float(region_similarity(mask, truth[name])))
        for expression, values in found.items():
            key = "false_area" if meanings[expression] is None else "J"
            rows.append({"clip": clip, "sentence": expression, key: fmean(values)})
    return rows


def _frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in decoded[::STRIDE]]


def weights_at(commit: str, folder: Path) -> str:
    """Write the bundled model as it was at that commit into the folder; returns the whole commit."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True).stdout

    whole = git("rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        (folder / name).write_bytes(git("show", f"{whole}:{_WEIGHTS / name}"))
    return whole


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """The mean over the expressions that have it."""
    return fmean(row[key] for row in rows if key in row)


def main() -> None:
    """Score both, print and write."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("folder", type=Path, help="where dog.mp4 and blocks.mp4 lie")
    parser.add_argument("--before", required=True, help="commit whose weights are compared")
    arguments = parser.parse_args()
    clips = {name: arguments.folder / f"{name}.mp4" for name in EXPRESSIONS}
    if missing := [str(path) for path in clips.values() if not path.is_file()]:
        parser.error(f"folder: missing {', '.join(missing)}")
    digests = {name: file_sha256(path) for name, path in clips.items()}
    with tempfile.TemporaryDirectory() as folder:
        base = weights_at(arguments.before, Path(folder))
        before = score(RefSAM.from_pretrained(folder).eval(), arguments.folder)
    now = score(RefSAM.from_pretrained("nano").eval(), arguments.folder)
    print(table(before, now))
    content = {"base": base, "sha256": digests, "stride": STRIDE, "before": before, "now": now}
    write_result(arguments, content)


def table(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Both as a Markdown table: J of every expression, its mean, and the area that is marked where nothing should be."""
    lines = [
        [old["sentence"], old["clip"], f"{old['J']:.3f}", f"{new['J']:.3f}"]
        for old, new in zip(before, now, strict=True)
        if "J" in old
    ]
    absent = f"marked for {len(now) - len(lines)} absent objects, % of the frame"
    for name, key, factor in (("mean J", "J", 1), (absent, "false_area", 100)):
        means = (factor * mean(rows, key) for rows in (before, now))
        lines.append([name, "", *(f"{value:.3f}" for value in means)])
    return markdown("expression | clip | before | now", lines, text=2)


if __name__ == "__main__":
    main()
