"""What an mp4 or mov file says and decord does not tell: where its edit list ends, and the shape of a pixel.

The file is a row of boxes, each with a length, a name and a content, which may be boxes again (ISO 14496-12).
"""

import math
import os
from collections.abc import Iterator


def end_and_aspect(path: str) -> tuple[float, float]:
    """The second at which the edit list ends (frames may be stored, and listed, beyond it; inf without one),
    and the width of a pixel by its height. (inf, 1.0) for a file of another kind."""
    movie = _movie(path)
    for track in (content for name, content in _boxes(movie) if name == b"trak"):
        if _find(track, b"mdia", b"minf", b"vmhd"):  # the first with pictures
            samples = _find(track, b"mdia", b"minf", b"stbl", b"stsd")[8:]  # a box: 78 bytes, then boxes
            entry = next((content for _, content in _boxes(samples)), b"")
            pixel = _find(entry[78:], b"pasp")
            wide, high = _number(pixel, 0), _number(pixel, 4)
            end = _end(_find(track, b"edts", b"elst"), _find(movie, b"mvhd"))
            return end, wide / high if wide and high else 1.0
    return math.inf, 1.0


def _end(edits: bytes, header: bytes) -> float:
    ticks = _number(header, 20 if header[:1] == b"\1" else 12)  # a second
    width = 8 if edits[:1] == b"\1" else 4  # bytes of a time; an edit has two, and its speed
    entries = [edits[k : k + 2 * width] for k in range(8, len(edits) - 2 * width, 2 * width + 4)]
    # In ticks; an entry that shows nothing, but delays the film, does not count in decord's time.
    durations = [_number(entry, 0, width) for entry in entries if entry[width:] != b"\xff" * width]
    return sum(durations) / ticks if ticks and durations and durations[-1] else math.inf  # 0: to the end


def _movie(path: str) -> bytes:
    """The content of the box moov, b"" where there is none."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[:4], "big") - 8  # of the content
            size = size if size != -7 else int.from_bytes(file.read(8), "big") - 16
            if not 0 <= size <= length:  # it reaches to the end of the file, or is no box
                break
            if head[4:] == b"moov":
                return file.read(size)
            file.seek(size, os.SEEK_CUR)
    return b""


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of each box in a box."""
    at = 0
    while (size := _number(content, at)) >= 8:
        yield content[at + 4 : at + 8], content[at + 8 : at + size]
        at += size


def _find(content: bytes, *names: bytes) -> bytes:
    """The content of the first box with the first name, in it of that with the second, ...; b"" if none."""
    for name in names:
        content = next((inner for found, inner in _boxes(content) if found == name), b"")
    return content


def _number(content: bytes, at: int, width: int = 4) -> int:
    return int.from_bytes(content[at : at + width], "big")
