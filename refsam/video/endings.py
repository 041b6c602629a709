"""Detects truncated files: FFmpeg takes the cut for the end.

The sizes in the container's own structure decide; nothing is decoded, and durations are not used.
"""

import struct
from collections.abc import Callable
from typing import BinaryIO

# Matroska's elements that hold others and may be of unknown size.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675

_BOXES = frozenset(
    b"ftyp styp moov moof mdat sidx ssix mfra free skip wide emsg prft uuid meta".split()
)


def is_cut_off(path: str, container: str) -> bool:
    """Whether the file is shorter than its container says; False if the container states no size.

    Args:
        path: a regular file.
        container: FFmpeg's name of its format.
    """
    walk = _WALKS.get(container)
    if walk is None:
        return False
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        return walk(file, size)


def _matroska(file: BinaryIO, size: int) -> bool:
    """EBML: each element has an id and a size; children of a segment or cluster without one follow it."""
    end, cluster_end = size, size
    while file.tell() < end:
        identifier, _ = _ebml_number(file, keep_marker=True)
        length, unknown = _ebml_number(file, keep_marker=False)
        if identifier is None or length is None:
            return True
        here = file.tell()
        if identifier == _SEGMENT:
            end = end if unknown else here + length
            if end > size:
                return True
        elif identifier == _CLUSTER:
            cluster_end = end if unknown else here + length
            if cluster_end > end:
                return True
        elif unknown or here + length > (cluster_end if here < cluster_end else end):
            return True  # a damaged size too: FFmpeg then looks for the next frames elsewhere, or finds none
        else:
            file.seek(length, 1)
    return False


def _ebml_number(file: BinaryIO, *, keep_marker: bool) -> tuple[int | None, bool]:
    """A number of one to eight bytes, None at the end of the file; whether all its bits are set: not known."""
    first = file.read(1)
    if not first or not first[0]:
        return None, False
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    if len(rest) < more:
        return None, False
    bits = 7 * (more + 1)
    number = int.from_bytes(first + rest, "big")
    value = number & ((1 << bits) - 1)
    return (number if keep_marker else value), value == (1 << bits) - 1


def _riff(file: BinaryIO, size: int) -> bool:
    """AVI: one RIFF chunk after the other. A recording that was never closed has sizes of 0."""
    while file.tell() + 8 <= size:
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length in (0, 0xFFFFFFFF):
            return False
        if file.seek(length + length % 2, 1) > size + length % 2:
            return True
    return False


def _gif(file: BinaryIO, size: int) -> bool:
    """Blocks up to the trailer; bytes after it do not count."""
    file.seek(10)
    _skip_colours(file)
    file.seek(2, 1)
    while file.tell() < size:
        kind = file.read(1)
        if kind == b";":
            return False
        if kind == b",":
            file.seek(8, 1)
            _skip_colours(file)
            file.seek(1, 1)
        elif kind == b"!":
            file.seek(1, 1)
        elif kind != b"\0":  # some encoders write one terminator too many
            return False
        while kind != b"\0" and (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], 1)
    return True


def _skip_colours(file: BinaryIO) -> None:
    """Read a byte of flags and skip the table of colours that may follow it."""
    flags = file.read(1)
    if flags and flags[0] & 0x80:
        file.seek(3 * 2 ** ((flags[0] & 7) + 1), 1)


def _ogg(file: BinaryIO, size: int) -> bool:
    while file.tell() < size:
        header = file.read(27)
        if not header.startswith(b"OggS"[: len(header)]):
            return False
        lengths = file.read(header[26]) if len(header) == 27 else b""
        if len(header) < 27 or len(lengths) < header[26] or file.seek(sum(lengths), 1) > size:
            return True
    return False


def _flv(file: BinaryIO, size: int) -> bool:
    """Tags (sound, pictures, script), each between two sizes of the one before it; other bytes do not count."""
    file.seek(5)
    file.seek(int.from_bytes(file.read(4), "big") + 4)
    while file.tell() < size:
        header = file.read(11)
        if header[0] & 0x1F not in (8, 9, 18):
            return False
        length = int.from_bytes(header[1:4], "big")
        if len(header) < 11 or file.seek(length, 1) > size:
            return True
        file.seek(4, 1)
    return False


def _fragments(file: BinaryIO, size: int) -> bool:
    """MP4: boxes. The index tells which of its frames are missing; only the boxes tell whether fragments are."""
    has_fragments = False
    while file.tell() + 8 <= size:
        start = file.tell()
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        has_fragments |= kind == b"moof"
        if not length or kind not in _BOXES:
            return False
        if file.seek(start + length) > size:
            return has_fragments
    return has_fragments and file.tell() < size  # within the first bytes of a box


_WALKS: dict[str, Callable[[BinaryIO, int], bool]] = {
    "matroska,webm": _matroska,
    "avi": _riff,
    "gif": _gif,
    "ogg": _ogg,
    "flv": _flv,
    "mov,mp4,m4a,3gp,3g2,mj2": _fragments,
}
