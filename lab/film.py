"""The answers about one clip, drawn (a part of answer.py): a picture of their steps, and the clip as a film.

Boxes are the tubes that the metrics judge, interpolated between steps: thinking ones blue, final ones red, and
those of sampled answers thin. Both functions get, for each sentence, its sample, its records as answer.ask
makes them (the greedy answer, then the sampled ones) and its caption.
"""

import io
import itertools
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import Config
from lab.sheet import COLOURS, STEPS, evenly
from metrics import Tube, tube_of
from rewards import is_valid
from runtime.files import write_whole
from samples import Sample
from video.frames import native_frames

FONT = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 16)
PAGE, CELL = 1280, 312  # pixels: width of a picture, at most, and the longer side of a frame in it
FILM, GIF = (640, 1920), (320, 480)  # the longer side of a film, at least and at most
BOLD, GAP, GREY = 3, 8, (140, 140, 140)
Outline = tuple[Tube, str, int, str]  # tube, "think" or "pred", width of its lines, label
Asked = tuple[Sample, list[dict], str]  # a sentence: its sample, its records, its caption


def save_picture(path: Path, asked: list[Asked], config: Config) -> None:
    """Draw frames of each sentence, from a step before its answers to one after. Raises OSError."""
    clip = asked[0][0]
    grid, (width, height) = clip.grid(config.text_format.step_seconds), size_of(clip, CELL, CELL)
    starts = [min(grid.first_frame(step), clip.num_frames - 1) for step in range(grid.num_steps)]
    blocks = []  # outlines, caption and chosen native frames
    for one in asked:
        outlines = outlines_of([one], config)
        spans = [tube[0] for tube, *_ in outlines]
        steps = [k for k, start in enumerate(starts) if any(a <= start < b for a, b in spans)] or [
            0,
            len(starts),
        ]
        blocks.append(
            (outlines, wrap(one[2], PAGE), evenly(starts[max(0, steps[0] - 1) : steps[-1] + 2], STEPS))
        )
    columns = min(PAGE // (width + GAP), max(len(frames) for *_, frames in blocks))
    needed = {frame for *_, frames in blocks for frame in frames}
    native = enumerate(native_frames(clip.video, clip.begin_frame, clip.begin_frame + max(needed) + 1))
    images = {frame: resized(pixels, (width, height)) for frame, pixels in native if frame in needed}
    row = height + 3 * GAP + FONT.size
    tops = [
        0,
        *itertools.accumulate(tall(text) + row * -(-len(frames) // columns) for _, text, frames in blocks),
    ]
    page = Image.new("RGB", (GAP + max(columns * (width + GAP), PAGE // 2), tops[-1]), "white")
    draw = ImageDraw.Draw(page)
    for (outlines, text, frames), y in zip(blocks, tops, strict=False):
        draw.multiline_text((GAP, y + GAP), text, "black", FONT)
        for k, frame in enumerate(frames):
            left, top = GAP + k % columns * (width + GAP), y + tall(text) + k // columns * row
            page.paste(boxed(images[frame], frame, outlines), (left, top))
            first, stop = span_of(outlines)
            colour = COLOURS["pred"] if first <= frame < stop else GREY
            draw.line([left, top + height + 3, left + width - 1, top + height + 3], colour, 4)
            draw.text(
                (left, top + height + GAP), f"{(clip.begin_frame + frame) / clip.fps:.2f} s", colour, FONT
            )
    page.save(content := io.BytesIO(), "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def save_film(path: Path, asked: list[Asked], config: Config) -> None:
    """Write the clip with the boxes of each moment as .mp4 or .gif. Raises OSError and VideoError."""
    clip, gif = asked[0][0], path.suffix == ".gif"
    images = draw_frames(asked, config, size_of(clip, *(GIF if gif else FILM)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_gif(images, clip) if gif else encode_mp4(images, clip.fps))


def outlines_of(asked: list[Asked], config: Config) -> list[Outline]:
    """The tubes of the answers that have one, the greedy one of each sentence last: it lies on top."""
    found = []
    for n, (sample, records, _) in enumerate(asked):
        for k, record in reversed(list(enumerate(records))):
            for name in ("think", "pred"):
                if tube := tube_of(record, sample, config, name):
                    label = str(n + 1) if len(asked) > 1 and k == 0 and name == "pred" else ""
                    found.append((tube, name, 1 if k else BOLD, label))
    return found


def span_of(outlines: list[Outline]) -> tuple[int, int]:
    """The native frames [first, stop) of the greedy answer; (0, 0) without one."""
    return next((tube[0] for tube, _, width, _ in outlines if width == BOLD), (0, 0))


def boxed(image: Image.Image, frame: int, outlines: list[Outline]) -> Image.Image:
    """A copy of a native frame with its boxes; final ones lie inside thinking ones, so equal ones are seen."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for ((first, stop), boxes), name, width, label in outlines:
        if first <= frame < stop and frame in boxes and is_valid(boxes[frame]):
            x1, y1, x2, y2 = np.multiply(boxes[frame], image.size * 2).round().astype(int).tolist()
            inset = width if name == "pred" and min(x2 - x1, y2 - y1) > 4 * width else 0
            corners = [x1 + inset, y1 + inset, max(x1, x2 - 1) - inset, max(y1, y2 - 1) - inset]
            draw.rectangle(corners, outline=COLOURS[name], width=width)
            draw.text((x1 + 3 * width, y1 + 2 * width), label, COLOURS[name], FONT)
    return image


def draw_frames(asked: list[Asked], config: Config, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Yield each native frame of the clip with its boxes, above the captions, which are white while their
    event lasts, and the time."""
    clip, outlines = asked[0][0], outlines_of(asked, config)
    texts = [
        (wrap(caption, size[0]), span_of(outlines_of([one], config))) for one in asked for caption in one[2:]
    ]
    tops = [size[1], *itertools.accumulate((tall(text) for text, _ in texts), initial=size[1])][1:]
    even = tops[-1] + 2 * GAP + FONT.size
    for frame, pixels in enumerate(
        native_frames(clip.video, clip.begin_frame, clip.begin_frame + clip.num_frames)
    ):
        image = Image.new("RGB", (size[0], even + even % 2))
        image.paste(boxed(resized(pixels, size), frame, outlines))
        draw = ImageDraw.Draw(image)
        for (text, (first, stop)), top in zip(texts, tops, strict=False):
            draw.multiline_text((GAP, top + GAP), text, "white" if first <= frame < stop else GREY, FONT)
        draw.text((GAP, tops[-1] + GAP), f"{(clip.begin_frame + frame) / clip.fps:.2f} s", "white", FONT)
        yield image


def encode_gif(images: Iterator[Image.Image], clip: Sample) -> bytes:
    """An animation. Its times are whole hundredths of a second, rounded so that the sum is right."""
    ends = [round(100 * k / clip.fps) for k in range(clip.num_frames + 1)]
    durations = [10 * (stop - start) for start, stop in itertools.pairwise(ends)]
    next(images).save(
        content := io.BytesIO(), "GIF", save_all=True, append_images=images, duration=durations, loop=0
    )
    return content.getvalue()


def encode_mp4(images: Iterator[Image.Image], fps: float) -> bytes:
    """H.264, or MPEG-4 where this build of PyAV lacks it; yuv420p, which every player knows."""
    import av

    codec = next(name for name in ("libx264", "libopenh264", "mpeg4") if name in av.codecs_available)
    with av.open(content := io.BytesIO(), "w", format="mp4") as film:
        stream, first = film.add_stream(codec, Fraction(fps).limit_denominator(1001)), next(images)
        (stream.width, stream.height), stream.pix_fmt = first.size, "yuv420p"
        for image in itertools.chain([first], images):
            film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode())
    return content.getvalue()


def size_of(clip: Sample, least: int, most: int) -> tuple[int, int]:
    """The even width and height at which a clip's frames are drawn, the longer side between two sizes."""
    longest = max(clip.width, clip.height)
    return tuple(
        max(2, round(n * min(max(longest, least), most) / longest / 2) * 2) for n in (clip.width, clip.height)
    )


def resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    enlarged = size[0] > pixels.shape[1]
    return Image.fromarray(pixels).resize(
        size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    )


def wrap(text: str, width: int) -> str:
    """Break a text into lines of at most so many pixels, about."""
    return textwrap.fill(text, max(8, int(len(text) * (width - 3 * GAP) / FONT.getlength(text))))


def tall(text: str) -> int:
    """Pixels that it takes, with the gaps around it."""
    return (text.count("\n") + 1) * (FONT.size + 4) + 2 * GAP
