"""Answers on the frames of their clips, and the contact sheet of them (a part of lab.pictures)."""

import functools
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from config import Config
from prompts import Items, parse_answer, where_it_fails
from rewards import is_valid
from samples import Box, Sample
from video.frames import VideoError, read_clip

STEPS, SIDE = 12, 200  # frames shown of a clip, at most; pixels of a frame's longer side
DPI = 100
FLAT, BEGIN = 8, 60  # steps of boxes without an inside, and characters of a malformed answer, named at most
COLOURS = {"truth": "#009628", "think": "#1e5aff", "pred": "#e11414"}  # STVG-o1, Fig. 3
GROWTH = {"truth": 2.5, "think": 0, "pred": -2.5}  # outlines inside one another: equal boxes are all seen
# For the letters that matplotlib's own font lacks, what is installed of fonts with Chinese, Japanese, Korean.
ASIAN = "CJK|Han Sans|WenQuanYi|Hei|IPA.*Gothic|Hiragino Sans|Malgun|Nanum|Unifont|Noto Emoji|Symbola"
_asian = {font.name for font in fontManager.ttflist if re.search(ASIAN, font.name)}
rcParams["font.family"] = ["DejaVu Sans", *sorted(_asian)]


@dataclass
class ShownAnswer:
    """What is drawn and said of an answer."""

    title: str  # "BEFORE", "STEP 20" or "AFTER"; empty for a sampled answer
    record: dict  # its line of predictions.jsonl or rollouts.jsonl
    scores: dict[str, float]
    spans: dict[str, tuple[int, int]]  # "truth" and, if the answer parses, "pred" -> first and last step
    boxes: dict[str, dict[int, Box]]  # "truth", "think", "pred" -> step -> box with an inside, in [0, 1]
    note: str  # what cannot be drawn


@dataclass
class Clip:
    steps: list[int]
    frames: np.ndarray  # uint8 (T, h, w, 3) of these steps, lightened
    error: str = ""  # why they are grey


@dataclass
class Card:
    """A sentence on its clip, with some of its answers."""

    sentence: str
    id: str
    clip: Clip
    answers: list[ShownAnswer]


Evaluations = dict[str, dict[str, ShownAnswer]]  # "BEFORE", "STEP 20", ..., "AFTER" -> id -> answer


def decimals(value: float) -> str:
    """Write a number with two decimals, and never "-0.00"."""
    return f"{value:z.2f}"


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly from the first to the last."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)]


def show_answer(record: dict, title: str, scores: dict[str, float], config: Config) -> ShownAnswer:
    """Prepare a record of predictions.jsonl or rollouts.jsonl."""
    answer = parse_answer(record["completion"], config.think)
    truth = record["truth"]  # of the record: it ends where the video does
    spans = {"truth": tuple(truth["span"])}
    boxes = {"truth": {int(step): tuple(box) for step, box in truth["boxes"].items()}}
    if answer is None:
        text, cut = record["completion"], ", cut off at max_new_tokens" * bool(record.get("truncated"))
        begin = " ".join(text.split())
        begin = begin if len(begin) <= BEGIN else f"{begin[:BEGIN]}..."
        note = f"malformed{cut}: {begin} ({where_it_fails(text, config.think)})"
        return ShownAnswer(title, record, scores, spans, boxes, note)
    framed = answer.in_frame(record["scale"])
    spans["pred"], boxes["think"], boxes["pred"] = framed.span, framed.think_boxes, framed.pred_boxes
    flat = [_flat_steps("think", framed.think or ()), _flat_steps("pred", framed.pred)]
    note = f"boxes without an inside: {', '.join(filter(None, flat))}" if any(flat) else ""
    drawn = {name: {k: box for k, box in items.items() if is_valid(box)} for name, items in boxes.items()}
    return ShownAnswer(title, record, scores, spans, drawn, note)


def _flat_steps(name: str, items: Items) -> str:
    """The name of a list, and the steps of its boxes without an inside; "" if there is none."""
    steps = [str(step) for step, box in items if not is_valid(box)]
    return " ".join([name, *steps[:FLAT], *["..."] * (len(steps) > FLAT)]) if steps else ""


def save(figure: Figure, file, **how) -> None:
    """Figure.savefig, but that letters which no font has are said once, not each by itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file, **how)
    for warning in caught:
        if re.match(r"Glyph \d+ .*missing", str(warning.message)):
            say_letters_lack()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@functools.cache
def say_letters_lack() -> None:
    words = "some letters are in no font that is installed, and drawn as boxes"
    print(f"{words}; for Chinese, Japanese and Korean: apt-get install fonts-noto-cjk", file=sys.stderr)


def read_shown_clip(sample: Sample, step_seconds: float) -> Clip:
    """Read at most STEPS frames, evenly over the clip; grey ones where the video cannot be read."""
    steps = evenly(range(sample.grid(step_seconds).num_steps), STEPS)
    longest = max(sample.width, sample.height)
    width, height = (max(1, round(n * SIDE / longest)) for n in (sample.width, sample.height))
    try:
        frames, error = read_clip(sample, [step * step_seconds for step in steps], (width, height)), ""
    except VideoError as unreadable:
        frames, error = np.full((len(steps), height, width, 3), 128, np.uint8), str(unreadable)
    frames = (255 - (255 - np.asarray(frames)) * 0.6).astype(np.uint8)  # outlines then show on any colour
    frames[:, :, -2:] = 255  # a gap before the next frame
    return Clip(steps[: len(frames)], frames, error)  # the file may end early


def grey_clip(answers: list[ShownAnswer]) -> Clip:
    """A clip without a video, which reaches beyond the true span and those of the answers."""
    last = max(span[1] for answer in answers for span in answer.spans.values())
    last_true = answers[0].spans["truth"][1]
    steps = evenly(range(min(last, last_true + STEPS) + 2), STEPS)
    frames = np.full((len(steps), SIDE * 9 // 16, SIDE, 3), 179, np.uint8)
    frames[:, :, -2:] = 255
    return Clip(steps, frames)


def draw_strip(axes: Axes, clip: Clip, answer: ShownAnswer) -> None:
    """Draw an answer on the frames, side by side: truth green, think boxes blue, pred boxes red. Under each
    frame a green bar says that its step is in the true span, a red one that it is in the answer's."""
    _, height, width, _ = clip.frames.shape
    axes.imshow(np.concatenate(list(clip.frames), axis=1))
    bar = SIDE / 20
    for k, step in enumerate(clip.steps):
        for name, boxes in answer.boxes.items():
            if step in boxes:
                x1, y1, x2, y2 = np.multiply(boxes[step], (width, height) * 2)
                x, y, grow = k * width + x1 - GROWTH[name], y1 - GROWTH[name], 2 * GROWTH[name]
                style = {"fill": False, "edgecolor": COLOURS[name], "linewidth": 1.4, "clip_on": False}
                axes.add_patch(Rectangle((x, y), x2 - x1 + grow, y2 - y1 + grow, **style))
        for row, name in enumerate(("truth", "pred")):
            first, last = answer.spans.get(name, (0, -1))
            colour = COLOURS[name] if first <= step <= last else "#e2e2e2"
            place = k * width, height + 3 + 1.4 * row * bar
            axes.add_patch(Rectangle(place, width - 2, bar, color=colour, linewidth=0))
    axes.set(xlim=(0, len(clip.steps) * width), ylim=(height + 3 + 2.4 * bar, 0), yticks=[], anchor="NW")
    axes.set_xticks((np.arange(len(clip.steps)) + 0.5) * width, clip.steps, color="0.45")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_sheet(name: str, cards: list[Card]) -> Figure:
    """Draw the first and the last answer of each card, in columns to be read downwards."""
    aspect = min(len(c.clip.steps) * c.clip.frames.shape[2] / c.clip.frames.shape[1] for c in cards)
    columns = 2 if aspect < 12 and len(cards) > 1 else 1
    rows, each = -(-len(cards) // columns), max(len(evenly(card.answers, 2)) for card in cards)
    width = 17 / columns  # inches, as all sizes here
    figure = Figure((20, 1 + rows * (0.7 + each * (width / aspect + 0.3))), dpi=DPI, layout="constrained")
    lines = [Line2D([], [], color=colour, linewidth=4) for colour in COLOURS.values()]
    names = "truth", "think boxes", "pred boxes   (bars: steps of the true and of the answered span)"
    style = {"ncols": 3, "frameon": False, "fontsize": 12, "title_fontsize": 15, "alignment": "left"}
    title = f"{name}: held-out answers, from the worst to the best, down the columns"
    legend = figure.legend(lines, names, loc="outside upper left", title=title, **style)
    legend.get_title().set_parse_math(False)  # a run may be called anything
    for k, card in enumerate(cards):
        for row, answer in enumerate(evenly(card.answers, 2)):
            place = (k % rows * each + row) * columns + k // rows + 1
            axes = figure.add_subplot(rows * each, columns, place)
            draw_strip(axes, card.clip, answer)
            words = [answer.title, *(f"{name} {decimals(value)}" for name, value in answer.scores.items())]
            axes.set_ylabel("\n".join(words), rotation=0, ha="right", va="center", fontsize=12)
            if row == 0:
                words = f"{'[no video] ' * bool(card.clip.error)}{card.sentence}"[: round(10 * width)]
                axes.set_title(words, loc="left", weight="bold", fontsize=12, parse_math=False)
            style = {"bbox": {"color": "white", "alpha": 0.8, "pad": 1}, "fontsize": 12, "parse_math": False}
            note = textwrap.fill(answer.note, round(9 * width))
            axes.text(6, 6, note, color=COLOURS["pred"], va="top", **style)
    return figure
