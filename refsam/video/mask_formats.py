"""The ways to keep masks: PNGs of 0 and 255, PNGs with DAVIS's palette, COCO's run lengths, cut-outs."""

import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from refsam.errors import UserError

FORMATS = ("png", "palette", "rle", "cutout")
_MOST_COLOURS = 255  # and the background
_SPOOL = "masks.jsonl"


class MaskFormat(Protocol):
    """Keeps the masks of one frame after the other in a folder."""

    def write(self, index: int, image: np.ndarray, masks: np.ndarray) -> None:
        """Keep masks ``(E, H, W)`` bool of a frame ``(H, W, 3)`` uint8 and its number."""

    def take_back(self, index: int) -> None:
        """Remove the files of a frame that could not be written completely."""

    def take_over(self, earlier: Path) -> None:
        """Take over the masks of an earlier run, unless its files stay where they are."""

    def finish(self, report: dict[str, Any]) -> None:
        """Write the files that are only complete at the end; `report` is the content of ``result.json``."""


def mask_format(name: str, folder: Path, expressions: int) -> MaskFormat:
    """The format of that name, one of `FORMATS`, writing into `folder` for that many expressions."""
    if name == "rle":
        return _RunLengths(folder, expressions)
    return _Pictures(name, folder, expressions)


def check_formats(formats: Sequence[str], expressions: int) -> None:
    """Refuse formats that cannot be written.

    Raises UserError: no such format, a missing package, or too many expressions for it.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {name}: want {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if "palette" in formats and expressions > _MOST_COLOURS:
        raise UserError(
            f"--format palette: got {expressions} expressions, a palette has room for {_MOST_COLOURS}"
        )
    if "rle" in formats and find_spec("pycocotools") is None:
        raise UserError("--format rle needs pycocotools: pip install 'refsam[eval]'")


def files_of(report: dict[str, Any], first: int | None = None) -> Iterator[str]:
    """Names of the mask files that a run with this ``result.json`` wrote, or those of its `first` frames."""
    frames = report.get("frame_numbers") or range(report["frames"])
    last = frames[-1] if frames else 0
    for name in report.get("formats", ["png"]):
        if name == "rle":
            yield "masks.json"
            continue
        for frame in frames[:first]:
            yield from picture_names(name, frame, last, len(report["expressions"]))


def picture_names(name: str, frame: int, last: int, expressions: int) -> list[str]:
    """The files of one frame; numbers are zero-padded so that they sort: five digits for frames, two for expressions."""
    file = f"{frame:0{max(5, len(str(last)))}d}.png"
    if name == "palette":
        return [f"palette/{file}"]
    folder = {"png": "masks", "cutout": "cutouts"}[name]
    digits = max(2, len(str(expressions - 1)))
    return [f"{folder}/{index:0{digits}d}/{file}" for index in range(expressions)]


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask ``(H, W)`` bool as an 8-bit grey PNG of 0 and 255.

    Run-length compression without filters is as fast as zlib's level 1, and its files are smaller than those of level 6.
    """
    height, width = mask.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row begins with its filter: none
    np.negative(mask.view(np.uint8), out=rows[:, 1:])
    compressor = zlib.compressobj(6, zlib.DEFLATED, strategy=zlib.Z_RLE)
    pixels = compressor.compress(rows.data) + compressor.flush()
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def encode_run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask ``(H, W)`` bool as COCO's compressed run lengths: ``size`` (height, width) and ``counts``."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


@cache
def davis_palette() -> bytes:
    """The palette of DAVIS and PASCAL VOC, three bytes a colour: bit by bit from the index."""
    return bytes(
        sum((index >> (3 * level + channel) & 1) << 7 - level for level in range(3))
        for index in range(256)
        for channel in range(3)
    )


def encode_numbers(numbers: np.ndarray) -> bytes:
    """A map of object numbers ``(H, W)`` uint8 as a PNG with DAVIS's palette."""
    picture = Image.fromarray(numbers)
    picture.putpalette(davis_palette())
    return _png(picture)


class _Pictures:
    """One PNG per frame, or one per frame and expression."""

    def __init__(self, name: str, folder: Path, expressions: int) -> None:
        self._name, self._folder, self._expressions = name, folder, expressions
        for path in {(folder / part).parent for part in picture_names(name, 0, 0, expressions)}:
            path.mkdir(parents=True)

    def write(self, index: int, image: np.ndarray, masks: np.ndarray) -> None:
        names = picture_names(self._name, index, index, self._expressions)
        for name, content in zip(names, self._encode(image, masks), strict=True):
            (self._folder / name).write_bytes(content)

    def take_back(self, index: int) -> None:
        for name in picture_names(self._name, index, index, self._expressions):
            (self._folder / name).unlink(missing_ok=True)

    def take_over(self, earlier: Path) -> None:
        """It stays where it is."""

    def finish(self, report: dict[str, Any]) -> None:
        """Give all numbers as many digits as the last one has."""
        frames = report["frame_numbers"]
        for frame in frames if frames and frames[-1] >= 10**5 else ():
            names = picture_names(self._name, frame, frame, self._expressions)
            wide = picture_names(self._name, frame, frames[-1], self._expressions)
            for old, new in zip(names, wide, strict=True):
                if (self._folder / old).exists():
                    (self._folder / old).rename(self._folder / new)

    def _encode(self, image: np.ndarray, masks: np.ndarray) -> Iterator[bytes]:
        if self._name == "png":
            yield from map(encode_mask, masks)
        elif self._name == "palette":
            indices = np.zeros(image.shape[:2], np.uint8)
            for index, mask in enumerate(masks):
                indices[mask] = index + 1
            yield encode_numbers(indices)
        else:
            for mask in masks:
                alpha = np.negative(mask.view(np.uint8))[..., None]
                yield _png(Image.fromarray(np.concatenate([image, alpha], axis=2)))


class _RunLengths:
    """``masks.json``: the content of ``result.json``, and each expression's ``segmentations``, one code per frame.

    Until the end, codes are kept in a file, one line per frame: those of a long video would fill memory.
    """

    def __init__(self, folder: Path, expressions: int) -> None:
        self._folder, self._expressions = folder, expressions
        self._spool = (folder.parent / _SPOOL).open("w+", encoding="ascii")

    def write(self, index: int, image: np.ndarray, masks: np.ndarray) -> None:
        self._frame_begins = self._spool.tell()
        self._add([encode_run_lengths(mask) for mask in masks])

    def take_over(self, earlier: Path) -> None:
        report = json.loads((earlier / "masks.json").read_text(encoding="utf-8"))
        of_expressions = [expression["segmentations"] for expression in report["expressions"]]
        for codes in zip(*of_expressions, strict=True):
            self._add(codes)

    def _add(self, codes: Sequence[dict[str, Any]]) -> None:
        self._spool.write(json.dumps(codes) + "\n")
        self._spool.flush()

    def take_back(self, index: int) -> None:
        self._spool.seek(self._frame_begins)
        self._spool.truncate()

    def finish(self, report: dict[str, Any]) -> None:
        others = {key: value for key, value in report.items() if key != "expressions"}
        head = json.dumps(others | {"expressions": []}, ensure_ascii=False)[: -len("]}")]
        place = self._folder / "masks.json"
        with place.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(head)
            for index, expression in enumerate(report["expressions"]):
                entry = json.dumps(expression, ensure_ascii=False)[:-1]
                file.write(("," if index else "") + f'\n{entry}, "segmentations": [\n')
                self._spool.seek(0)
                for number, line in enumerate(self._spool):
                    file.write((",\n" if number else "") + json.dumps(json.loads(line)[index]))
                file.write("]}")
            file.write("]}\n")
        self._spool.close()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _png_chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
