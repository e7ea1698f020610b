"""Answers on the frames of their clips, and the contact sheet of them (a part of lab.pictures)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
from matplotlib.patches import Rectangle

from config import Config
from prompts import parse_answer
from rewards import is_valid
from samples import Box, Sample
from video.frames import VideoError, read_clip

STEPS, SIDE = 12, 168  # frames shown of a clip, at most; pixels of a frame's longer side
COLOURS = {"truth": "#009628", "think": "#1e5aff", "pred": "#e11414"}  # STVG-o1, Fig. 3
GROWTH = {"truth": 2.5, "think": 0, "pred": -2.5}  # outlines inside one another: equal boxes are all seen
LIGHT = 0.6  # contrast that is left of a frame, so that outlines show on any colour
PALE = "#e2e2e2"  # a bar outside its span
DPI = 100


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

    sample: Sample
    clip: Clip
    answers: list[ShownAnswer]

    @property
    def title(self) -> str:
        kind = f" ({self.sample.question_type})" if self.sample.question_type else ""
        return f"{self.sample.sentence}{kind}"


def decimals(value: float) -> str:
    """Write a number with two decimals, and never "-0.00"."""
    return f"{round(value, 2) + 0:.2f}"


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
        note = f"malformed: {' '.join(record['completion'].split())[:80] or '(empty)'}"
        if record.get("truncated"):
            note = f"cut off at max_new_tokens, {note}"
        return ShownAnswer(title, record, scores, spans, boxes, note)
    framed = answer.in_frame(record["scale"])
    spans["pred"], boxes["think"], boxes["pred"] = framed.span, framed.think_boxes, framed.pred_boxes
    flat = sum(not is_valid(box) for _, box in (*(framed.think or ()), *framed.pred))
    note = f"{flat} box{'es' * (flat > 1)} without an inside" if flat else ""
    drawn = {name: {k: box for k, box in items.items() if is_valid(box)} for name, items in boxes.items()}
    return ShownAnswer(title, record, scores, spans, drawn, note)


def read_shown_clip(sample: Sample, step_seconds: float) -> Clip:
    """Read at most STEPS frames, evenly over the clip; grey ones where the video cannot be read."""
    steps = evenly(range(sample.grid(step_seconds).num_steps), STEPS)
    longest = max(sample.width, sample.height)
    width, height = (max(1, round(n * SIDE / longest)) for n in (sample.width, sample.height))
    try:
        frames, error = read_clip(sample, [step * step_seconds for step in steps], (width, height)), ""
    except VideoError as unreadable:
        frames, error = np.full((len(steps), height, width, 3), 128, np.uint8), str(unreadable)
    frames = (255 - (255 - np.asarray(frames)) * LIGHT).astype(np.uint8)
    frames[:, :, -2:] = 255  # a gap before the next frame
    return Clip(steps[: len(frames)], frames, error)  # the file may end early


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
            colour = COLOURS[name] if first <= step <= last else PALE
            place = k * width, height + 3 + 1.4 * row * bar
            axes.add_patch(Rectangle(place, width - 2, bar, color=colour, linewidth=0))
    axes.set(xlim=(0, len(clip.steps) * width), ylim=(height + 3 + 2.4 * bar, 0), yticks=[], anchor="NW")
    axes.set_xticks((np.arange(len(clip.steps)) + 0.5) * width, clip.steps, color="0.45")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_sheet(title: str, cards: list[Card]) -> Figure:
    """Draw the first and the last answer of each card, in columns to be read downwards."""
    answers = [list({id(a): a for a in (card.answers[0], card.answers[-1])}.values()) for card in cards]
    aspect = min(len(c.clip.steps) * c.clip.frames.shape[2] / c.clip.frames.shape[1] for c in cards)
    columns = 2 if aspect < 10 and len(cards) > 1 else 1
    rows = -(-len(cards) // columns)
    width, margin, line, header = (2000 - 200 * columns) // columns, 130, 32, 84
    strip = round(min(width / aspect, 260)) + 24  # pixels, the bars included
    block = line + max(map(len, answers)) * (strip + 8) + line
    size = np.array([columns * (width + margin + 30), header + rows * block])
    figure = Figure(figsize=size / DPI, dpi=DPI)

    def write(x: float, y: float, words: str, **style) -> None:
        """Words at a pixel from the upper left corner; a `$` is no mathematics."""
        place = x / size[0], 1 - y / size[1]
        figure.text(*place, words, **{"fontsize": 12, "va": "center", "parse_math": False, **style})

    write(12, 22, title, weight="bold", fontsize=15)
    for x, name, words in ((12, "truth", "truth"), (92, "think", "think boxes"), (222, "pred", "pred boxes")):
        write(x, 54, f"▬ {words}", color=COLOURS[name])
    write(350, 54, "bars: steps of the true and of the answered span")
    for k, (card, shown) in enumerate(zip(cards, answers, strict=True)):
        left, top = k // rows * (width + margin + 30) + margin, header + k % rows * block
        words = f"{'[no video] ' * bool(card.clip.error)}{card.title}"
        most = width // 11
        write(left, top + line / 2, words if len(words) <= most else f"{words[:most]} ...", weight="bold")
        for row, answer in enumerate(shown):
            y = top + line + row * (strip + 8)
            box = left / size[0], 1 - (y + strip) / size[1], width / size[0], strip / size[1]
            axes = figure.add_axes(box)
            draw_strip(axes, card.clip, answer)
            if answer is not shown[-1]:
                axes.set_xticks([])
            words = [answer.title, *(f"{name} {decimals(value)}" for name, value in answer.scores.items())]
            write(left - 10, y + strip / 2, "\n".join(words), ha="right")
            if answer.note:
                back = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 2}
                write(left + 6, y + 14, answer.note, color=COLOURS["pred"], bbox=back)
    return figure
