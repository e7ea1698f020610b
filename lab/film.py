"""The answers about one clip, drawn (a part of answer.py): a picture of their steps, and the clip as a film.

Boxes are the tubes that the metrics judge, interpolated between steps: thinking ones blue, final ones red,
those of sampled answers thin.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from config import Config
from lab.sheet import COLOURS, STEPS, evenly, say_letters_lack
from metrics import Tube, tube_of
from rewards import is_valid
from runtime.files import write_whole
from samples import Sample
from video.frames import native_frames

PAGE, CELL = 1280, 312  # pixels: width of a picture, longer side of a frame in it
SIDES = {".mp4": (640, 1920), ".gif": (320, 480)}  # longer side of a film, at least and at most
LETTERS, GAP, BELOW = 16, 8, 32  # height of letters, space around things, height of what stands below a frame
GIF_FPS = 16  # frames a second, at most: gifs are large; its clock has hundredths of a second
BOLD, GREY = 3, (140, 140, 140)
Asked = tuple[Sample, list[dict], str]  # a sentence; records of its greedy and its sampled answers; caption
Outline = tuple[Tube, str, int, str]  # of an answer; "think" or "pred"; width of its lines; label


def save_picture(path: Path, asked: list[Asked], config: Config) -> None:
    """Draw the frames of each sentence's answers, and of a step before and after. Raises OSError."""
    clip, font, blocks = asked[0][0], font_for(asked), []  # blocks: caption, outlines, native frames to show
    grid, size = clip.grid(config.text_format.step_seconds), size_of(clip, CELL, CELL)
    starts = [min(grid.first_frame(step), clip.num_frames - 1) for step in range(grid.num_steps)]
    for one in asked:
        outlines = outlines_of([one], config)
        edges = [edge for tube, *_ in outlines for edge in tube[0]] or [0, clip.num_frames]
        before = min(edges) - grid.step_seconds * clip.fps - 1
        shown = evenly([frame for frame in starts if before <= frame <= max(edges)], STEPS)
        blocks.append((wrap(one[2], PAGE, font), outlines, shown))
    blocks.append((wrap(legend_of(asked), PAGE, font), [], []))
    needed = {frame for *_, shown in blocks for frame in shown}
    native = enumerate(images_of(clip, size, max(needed) + 1))
    images = {frame: image for frame, image in native if frame in needed}
    columns = min(PAGE // (size[0] + GAP), max(len(shown) for *_, shown in blocks))
    width, row = max(columns * (size[0] + GAP), PAGE // 2), size[1] + BELOW + GAP
    heights = (tall(text) + row * -(-len(shown) // columns) for text, _, shown in blocks)
    tops = [*itertools.accumulate(heights, initial=0)]
    page = Image.new("RGB", (GAP + width, tops[-1]), "white")
    for (text, outlines, shown), y in zip(blocks, tops, strict=False):
        ImageDraw.Draw(page).multiline_text((GAP, y + GAP), text, "black", font)
        for k, frame in enumerate(shown):
            place = GAP + k % columns * (size[0] + GAP), y + tall(text) + k // columns * row
            page.paste(draw_cell(clip, frame, images[frame], outlines, font), place)
    page.save(content := io.BytesIO(), "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def save_film(path: Path, asked: list[Asked], config: Config) -> None:
    """Write the clip with the boxes of each moment as .mp4 or .gif. Raises OSError and VideoError."""
    clip, frames = asked[0][0], draw_film(asked, config, size_of(asked[0][0], *SIDES[path.suffix]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_gif(frames, clip) if path.suffix == ".gif" else encode_mp4(frames, clip))


def draw_film(asked: list[Asked], config: Config, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Yield the clip's native frames with their boxes, above the captions, black while their event lasts."""
    clip, outlines, font = asked[0][0], outlines_of(asked, config), font_for(asked)
    texts = [(wrap(one[2], size[0], font), outlines_of([one], config)) for one in asked]
    texts.append((wrap(legend_of(asked), size[0], font), []))
    tops = [*itertools.accumulate((tall(text) for text, _ in texts), initial=size[1] + BELOW)]
    for frame, image in enumerate(images_of(clip, size, clip.num_frames)):
        page = Image.new("RGB", (size[0], tops[-1] + tops[-1] % 2), "white")
        page.paste(draw_cell(clip, frame, image, outlines, font))
        for (text, own), top in zip(texts, tops, strict=False):
            colour = "black" if lasts(own, frame) else GREY
            ImageDraw.Draw(page).multiline_text((GAP, top + GAP), text, colour, font)
        yield page


def legend_of(asked: list[Asked]) -> str:
    sampled = any(len(records) > 1 for _, records, _ in asked)
    return "blue: thinking boxes, red: final boxes" + ("; thin: sampled answers" if sampled else "")


def draw_cell(clip: Sample, frame: int, image: Image.Image, outlines: list[Outline], font) -> Image.Image:
    """A native frame with its boxes, final ones inside thinking ones, so that equal ones are seen; below it
    its second, under a line that is red while an event lasts."""
    cell = Image.new("RGB", (image.width, image.height + BELOW), "white")
    cell.paste(image)
    draw, colour = ImageDraw.Draw(cell), COLOURS["pred"] if lasts(outlines, frame) else GREY
    for (_, boxes), name, width, label in outlines:
        if frame in boxes and is_valid(boxes[frame]):
            x1, y1, x2, y2 = np.multiply(boxes[frame], image.size * 2).round().astype(int).tolist()
            inset = width if name == "pred" and min(x2 - x1, y2 - y1) > 4 * width else 0
            corners = x1 + inset, y1 + inset, max(x1, x2 - 1) - inset, max(y1, y2 - 1) - inset
            draw.rectangle(corners, outline=COLOURS[name], width=width)
            draw.text((x1 + GAP, y1 + GAP), label, COLOURS[name], font, stroke_width=2, stroke_fill="white")
    draw.rectangle([0, image.height + 2, image.width - 1, image.height + 5], colour)
    draw.text((GAP, image.height + GAP), f"{(clip.begin_frame + frame) / clip.fps:.2f} s", colour, font)
    return cell


def outlines_of(asked: list[Asked], config: Config) -> list[Outline]:
    """The tubes of all answers that have one, a sentence's greedy one last: it lies on top."""
    found = []
    for n, (sample, records, _) in enumerate(asked):
        for k, record in reversed(list(enumerate(records))):
            for name in ("think", "pred"):
                if tube := tube_of(record, sample, config, name):
                    label = str(n + 1) if len(asked) > 1 and k == 0 and name == "pred" else ""
                    found.append((tube, name, 1 if k else BOLD, label))
    return found


def lasts(outlines: list[Outline], frame: int) -> bool:
    """Whether a native frame is in the interval of a greedy answer."""
    return any(tube[0][0] <= frame < tube[0][1] for tube, _, width, _ in outlines if width == BOLD)


def images_of(clip: Sample, size: tuple[int, int], stop: int) -> Iterator[Image.Image]:
    frames = native_frames(clip.video, clip.begin_frame, clip.begin_frame + stop)
    return (Image.fromarray(pixels).resize(size) for pixels in frames)


def encode_gif(images: Iterator[Image.Image], clip: Sample) -> bytes:
    every = math.ceil(clip.fps / GIF_FPS)
    frames = [*range(0, clip.num_frames, every), clip.num_frames]
    ends, images = [round(100 * k / clip.fps) for k in frames], itertools.islice(images, 0, None, every)
    durations, content = [10 * (stop - start) for start, stop in itertools.pairwise(ends)], io.BytesIO()
    next(images).save(content, "GIF", save_all=True, append_images=images, duration=durations, loop=0)
    return content.getvalue()


def encode_mp4(images: Iterator[Image.Image], clip: Sample) -> bytes:
    import av

    codec = next(name for name in ("libx264", "libopenh264", "mpeg4") if name in av.codecs_available)
    with av.open(content := io.BytesIO(), "w", format="mp4") as film:
        stream, first = film.add_stream(codec, Fraction(clip.fps).limit_denominator(1001)), next(images)
        (stream.width, stream.height), stream.pix_fmt = first.size, "yuv420p"  # which every player knows
        for image in itertools.chain([first], images):
            film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode())
    return content.getvalue()


def size_of(clip: Sample, least: int, most: int) -> tuple[int, int]:
    """The even width and height in which a clip is drawn, its longer side between two numbers of pixels."""
    longest = max(clip.width, clip.height)
    zoom = min(max(longest, least), most) / longest
    return tuple(max(2, round(side * zoom / 2) * 2) for side in (clip.width, clip.height))


def font_for(asked: list[Asked]) -> ImageFont.FreeTypeFont:
    """The first of lab.sheet's fonts that has all letters of the captions; else the first, which is said."""
    letters = {ord(letter) for *_, caption in asked for letter in caption if letter > " "}
    paths = [findfont(FontProperties(family=[name])) for name in rcParams["font.family"]]
    fitting = [path for path in paths if letters <= FT2Font(path).get_charmap().keys()]
    if not fitting:
        say_letters_lack()
    return ImageFont.truetype((fitting or paths)[0], LETTERS)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break a text into lines of about so many pixels."""
    text = " ".join(text.split())
    return textwrap.fill(text, max(8, int(len(text) * (width - 3 * GAP) / font.getlength(text))))


def tall(text: str) -> int:
    """The height of its lines, with the space around them."""
    return (text.count("\n") + 1) * (LETTERS + 4) + 2 * GAP
