"""HEIF photographs as phones store them, in tiles: FFmpeg encodes them, the boxes (ISO 23008-12) are put around them here."""

import struct
from pathlib import Path

import av
import numpy as np

TILE = 64


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full_box(kind: bytes, version: int, *parts: bytes, flags: int = 0) -> bytes:
    return box(kind, bytes([version, 0, 0, flags]), *parts)


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def encode_tiles(folder: Path, tiles: list[np.ndarray]) -> tuple[bytes, list[bytes]]:
    """The decoder's settings and each tile's data."""
    path = folder / "tiles.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=1)
        stream.height, stream.width, stream.pix_fmt = TILE, TILE, "yuv444p"
        stream.options = {"x265-params": "keyint=1:lossless=1:log-level=none"}
        for tile in tiles:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(tile, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        settings = container.streams.video[0].codec_context.extradata
        return bytes(settings), [bytes(p) for p in container.demux(video=0) if p.size]


def write_tiled_heif(path: Path, image: np.ndarray) -> Path:
    """(rows * 64, columns * 64, 3) uint8 RGB, some levels off by the colours' conversion."""
    rows, columns = image.shape[0] // TILE, image.shape[1] // TILE
    tiles = [
        image[TILE * r : TILE * (r + 1), TILE * c : TILE * (c + 1)]
        for r in range(rows)
        for c in range(columns)
    ]
    settings, coded = encode_tiles(path.parent, tiles)
    grid, items = len(tiles) + 1, range(1, len(tiles) + 1)

    def meta(start: int) -> bytes:
        hidden = [full_box(b"infe", 2, numbers(i, 0), b"hvc1", b"\0", flags=1) for i in items]
        info = [*hidden, full_box(b"infe", 2, numbers(grid, 0), b"grid", b"\0")]
        sizes = [
            full_box(b"ispe", 0, struct.pack(">II", width, height))
            for width, height in ((TILE, TILE), (columns * TILE, rows * TILE))
        ]
        owners = [numbers(i) + bytes([2, 0x81, 2]) for i in items] + [numbers(grid) + b"\1\3"]
        places, offset = [], start
        for i, data in zip(items, coded, strict=True):
            places.append(numbers(i, 0, 0, 1) + struct.pack(">II", offset, len(data)))
            offset += len(data)
        places.append(numbers(grid, 1, 0, 1) + struct.pack(">II", 0, 8))
        return full_box(
            b"meta",
            0,
            full_box(b"hdlr", 0, bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", 0, numbers(grid)),
            full_box(b"iinf", 0, numbers(grid), *info),
            full_box(b"iref", 0, box(b"dimg", numbers(grid, len(tiles), *items))),
            box(
                b"iprp",
                box(b"ipco", box(b"hvcC", settings), *sizes),
                full_box(b"ipma", 0, struct.pack(">I", grid), *owners),
            ),
            box(b"idat", bytes([0, 0, rows - 1, columns - 1]), numbers(*image.shape[1::-1])),
            full_box(b"iloc", 1, b"\x44\x00", numbers(grid), *places),
        )

    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    start = len(head) + len(meta(0)) + 8
    path.write_bytes(head + meta(start) + box(b"mdat", *coded))
    return path
