"""The contact sheet of answers: held-out sentences from the worst to the best, as one picture of their frames
with the boxes in the colours of STVG-o1, Fig. 3. How it reads answers and frames serves report.py as well.
Nothing is learned from a picture, so a video that cannot be read ends none: its frames are grey."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
from matplotlib.lines import Line2D

from config import Config, load_config
from data import load_samples
from lab.bench import is_number
from lab.page import COLOURS, LIGHT
from metrics import native_scores, scale_of, tube_from_answer
from prompts import Answer, parse_answer
from rewards import is_valid, score
from runtime.files import DataError, short
from runtime.predictions import read_predictions
from samples import Box, Sample, Truth
from video.frames import VideoError, read_clip, resize

# ----------------------------------------------------------------------------------------------------------
# Boxes on frames


def overlay(frame: np.ndarray, boxes: dict[str, Box], side: int) -> np.ndarray:
    """A frame brought to a longer side of about `side` pixels, with outlines of the boxes.

    frame: uint8 (H, W, 3). boxes: key of COLOURS -> box in [0, 1]; one without an inside is not drawn. The
    frame is lightened, so that outlines show on any colour. They are 2 pixels wide and lie inside one another
    (truth, think, pred), so that equal boxes are all seen. Returns uint8 (h, w, 3).
    """
    image = (255 - (255 - fit(frame, side)) * LIGHT).astype(np.uint8)
    height, width = image.shape[:2]
    ys, xs = np.mgrid[:height, :width]
    for first, (name, colour) in zip((-2, 0, 2), COLOURS.items(), strict=True):
        if name in boxes and is_valid(boxes[name]):
            left, top, right, bottom = (round(v * (width, height)[k % 2]) for k, v in enumerate(boxes[name]))
            # How far inside the box a pixel lies: 0 on its border, negative outside, (h, w).
            depth = np.minimum.reduce([xs - left, right - 1 - xs, ys - top, bottom - 1 - ys])
            first = min(first, depth.max() - 1)  # a box with no room for its line gets it further out
            image[(depth >= first) & (depth < first + 2)] = colour
    return image


def fit(frame: np.ndarray, side: int) -> np.ndarray:
    """A frame whose longer side is about `side` pixels. Small ones are enlarged by a whole factor, pixel by
    pixel, so that they stay sharp."""
    longest = max(frame.shape[:2])
    if longest <= side:
        factor = round(side / longest)
        return frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(n * side / longest)) for n in frame.shape[:2])
    return resize(frame[None], (width, height))[0].numpy()


# ----------------------------------------------------------------------------------------------------------
# The contact sheet. All sizes are in pixels of the picture

DPI = 100
SAMPLES = 8  # sentences shown
STEPS = 12  # frames shown of a clip, at most
SIDE, WIDE = 168, 1900  # longer side of a frame, at most; what the frames of a row may take together, about
SCREEN = 2600  # two columns, where they are not wider than this
GAP, BAR = 4, 6  # between frames; height of the bars that mark the spans
MARGIN, HEADER, LINE = 160, 90, 30  # left of the frames, with the scores; above all; a line of text
PALE = (226, 226, 226)  # a bar outside its span
GREY = 192  # of the frames of a video that cannot be read


@dataclass
class Answered:
    """An answer to a held-out sentence, and what it is worth."""

    name: str  # "BEFORE", "AFTER" or "STEP 100"
    text: str
    answer: Answer | None  # in the numbers of the text; None: the text does not parse
    scale: tuple[int, int]  # of the text's coordinates
    rewards: dict[str, float]  # terms, unweighted, and "total"
    native: dict[str, float]  # tIoU and vIoU on native frames, as in the paper's tables

    @property
    def framed(self) -> Answer | None:
        """The answer with its boxes in [0, 1]."""
        return self.answer and self.answer.in_frame(self.scale)


@dataclass
class Block:
    """A sentence on the sheet: its rows of frames, one beneath the other, and texts beside them."""

    image: np.ndarray  # uint8 (h, w, 3)
    texts: list[tuple[float, float, str, dict]]  # x, y from the upper left corner, words, how to write them


def draw_answers(run: Path, predictions: str = "predictions.jsonl", name: str = "AFTER") -> Figure:
    """The contact sheet: SAMPLES held-out sentences, evenly from the worst to the best reward of the answers
    in a file of the run folder. Those before training are drawn above them. name: what the former are
    called. Raises DataError for records that cannot be used."""
    config = load_config(run / "config.yaml")
    known = held_out(config)
    final = read_answers(run / predictions, name, known, config)
    before = {}
    if predictions != "predictions_before.jsonl" and (run / "predictions_before.jsonl").is_file():
        before = read_answers(run / "predictions_before.jsonl", "BEFORE", known, config)
    return draw_sheet(run.resolve().name, known, before, final, config)


def draw_sheet(
    name: str,
    known: dict[str, Sample],
    before: dict[str, Answered],
    final: dict[str, Answered],
    config: Config,
) -> Figure:
    """The contact sheet of answers that have been read. name: of the run."""
    ranked = by_reward(final)
    places = np.linspace(0, len(ranked) - 1, min(SAMPLES, len(ranked))).round().astype(int)
    chosen = [ranked[place] for place in places]
    seconds = config.text_format.step_seconds
    blocks = [
        draw_block(known[key], [answers[key] for answers in (before, final) if key in answers], seconds)
        for key in chosen
    ]
    title = f"{name}: held-out answers, worst to best of {len(ranked)}, down the columns"
    return lay_out(blocks, f"{title} (one step = {seconds:g} s)")


def held_out(config: Config) -> dict[str, Sample]:
    """id -> sentence of the held-out split. Raises DataError."""
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)
    return {sample.id: sample for sample in samples}


def by_reward(answers: dict[str, Answered]) -> list[str]:
    """ids, from the worst answer to the best."""
    return sorted(answers, key=lambda key: answers[key].rewards["total"])


def read_answers(path: Path, name: str, known: dict[str, Sample], config: Config) -> dict[str, Answered]:
    """id -> answer. Only its text is needed, and what scale_of needs. Sentences whose videos could not be
    read are left out. Raises DataError."""
    answers = {}
    for record in read_predictions(path):
        if "unreadable" in record:
            continue
        if record["id"] not in known:
            raise DataError(f"{path}: {record['id']!r} is no sentence of {config.eval_annotations}")
        sample = known[record["id"]]
        text, scale = record["completion"], scale_of(record, sample, config)
        try:
            rewards = rewards_of(record, sample, scale, config)
        except ValueError as error:
            raise DataError(f"{path}: {sample.id!r}: {error}") from error
        answer = parse_answer(text, config.think)
        tube = tube_from_answer(answer, sample, config.text_format, scale)
        answers[sample.id] = Answered(name, text, answer, scale, rewards, native_scores(tube, sample))
    if not answers:
        raise DataError(f"{path}: holds no answers; write it again with evaluate.py")
    return answers


def rewards_of(record: dict, sample: Sample, scale: tuple[int, int], config: Config) -> dict[str, float]:
    """The rewards of an answer as its record has them, since the file of one's own rewards may have changed;
    a record without any is scored. Raises ValueError that says what is wrong with them."""
    if "rewards" not in record:
        truth = sample.truth(config.text_format.step_seconds)
        scored = score(record["completion"], truth, scale, config.rewards, config.think)
        return scored.rewards
    rewards, most = record["rewards"], sys.float_info.max
    names = isinstance(rewards, dict) and "total" in rewards
    if not names or not all(is_number(value, -most, most) for value in rewards.values()):
        raise ValueError(f'"rewards" {short(rewards)} are not numbers with a "total"; remove the key')
    return rewards


def draw_block(sample: Sample, answers: list[Answered], step_seconds: float) -> Block:
    """The frames of at most STEPS steps, evenly over the clip, once for each answer."""
    truth = sample.truth(step_seconds)
    steps, frames, fault = shown_frames(sample, step_seconds)
    side = min(SIDE, max(SIDE // 2, WIDE // len(steps)))
    strips, texts, top = [], [], LINE
    for answer in answers:
        strip = draw_strip(frames, steps, truth, answer, side)
        short = max(0, 4 * LINE - len(strip))  # room for the four lines beside it
        strips.append(np.pad(strip, ((0, short), (0, 0), (0, 0)), constant_values=255))
        middle = top + len(strips[-1]) / 2
        texts.append((MARGIN - 12, middle, _scores(answer), {"ha": "right", "va": "center"}))
        top += len(strips[-1])
    image = np.pad(np.concatenate(strips), ((LINE, LINE), (MARGIN, 0), (0, 0)), constant_values=255)
    width = image.shape[1] - MARGIN
    words = f"{sample.sentence} ({sample.question_type})" if sample.question_type else sample.sentence
    words = f"[no video] {words}" if fault else words
    most = max(width // 11, 20)
    title = words if len(words) <= most else f"{words[: most - 4]} ..."
    texts.append((MARGIN, LINE / 2, title, {"va": "center", "weight": "bold"}))
    for k, step in enumerate(steps):
        x = MARGIN + (k + 0.5) * width / len(steps) - GAP / 2
        words = f"step {step}" if k == 0 else str(step)
        texts.append((x, top, words, {"ha": "center", "va": "top", "color": "0.45"}))
    return Block(image, texts)


def shown_frames(sample: Sample, step_seconds: float) -> tuple[list[int], np.ndarray, str]:
    """At most STEPS steps, evenly over the clip, but for those that its file, which may end early, does not
    hold; their frames, uint8 (T, H, W, 3); and why they are grey, if they are."""
    num_steps = sample.grid(step_seconds).num_steps
    steps = np.linspace(0, num_steps - 1, min(num_steps, STEPS)).round().astype(int).tolist()
    try:
        frames = read_clip(sample, [i * step_seconds for i in steps])
    except VideoError as error:
        longest = max(sample.height, sample.width)
        size = [max(1, round(SIDE * n / longest)) for n in (sample.height, sample.width)]
        return steps, np.full((len(steps), *size, 3), GREY, np.uint8), str(error)
    return steps[: len(frames)], frames, ""


def draw_strip(
    frames: np.ndarray, steps: list[int], truth: Truth, answered: Answered, side: int
) -> np.ndarray:
    """One answer on the frames (T, H, W, 3) of T steps, side by side: uint8 (h, w, 3). Under a frame there is
    a green bar where the step is in the true span, and a red one where it is in the answer's."""
    answer = answered.framed
    boxes = {"truth": truth.boxes, "think": {}, "pred": {}}
    spans = {"truth": truth.span, "pred": (0, -1)}
    if answer is not None:
        spans["pred"] = answer.span
        boxes |= {"think": answer.think_boxes, "pred": answer.pred_boxes}
    tiles = []
    for frame, step in zip(frames, steps, strict=True):
        here = {name: items[step] for name, items in boxes.items() if step in items}
        parts = [overlay(frame, here, side)]
        for name, (first, last) in spans.items():
            bar = np.full((BAR + 2, parts[0].shape[1], 3), 255, np.uint8)
            bar[2:] = COLOURS[name] if first <= step <= last else PALE
            parts.append(bar)
        tiles.append(np.pad(np.concatenate(parts), ((0, 2 * GAP), (0, GAP), (0, 0)), constant_values=255))
    return np.concatenate(tiles, axis=1)


def _scores(answered: Answered) -> str:
    lines = [answered.name, f"reward {answered.rewards['total']:.2f}"]
    if answered.answer is None:
        return "\n".join([*lines, "malformed"])
    return "\n".join([*lines, *(f"{name} {answered.native[name]:.2f}" for name in ("tIoU", "vIoU"))])


def lay_out(blocks: list[Block], title: str) -> Figure:
    """The blocks beneath one another, in two columns where they fit on a screen, read downwards."""
    height = max(len(block.image) for block in blocks)
    width = max(block.image.shape[1] for block in blocks) + 20
    columns = 2 if len(blocks) > 3 and 2 * width <= SCREEN else 1
    rows = -(-len(blocks) // columns)
    size = max(columns * width, 1200), HEADER + rows * height  # wide enough for the header
    canvas = np.full((size[1], size[0], 3), 255, np.uint8)
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    for k, block in enumerate(blocks):
        left, top = k // rows * width, HEADER + k % rows * height
        canvas[top : top + block.image.shape[0], left : left + block.image.shape[1]] = block.image
        for x, y, words, style in block.texts:
            _write(figure, left + x, top + y, words, size, **style)
    figure.figimage(canvas, origin="upper")
    _write(figure, 14, 26, title, size, va="center", weight="bold", fontsize=16)
    lines = [Line2D([], [], color=np.array(colour) / 255, linewidth=4) for colour in COLOURS.values()]
    names = ["truth", "think boxes", "pred boxes   (bars: steps of the true and of the answered span)"]
    place = {"loc": "center left", "bbox_to_anchor": (4 / size[0], 1 - 60 / size[1])}
    figure.legend(lines, names, **place, ncols=3, frameon=False, fontsize=14)
    return figure


def _write(figure: Figure, x: float, y: float, words: str, size: tuple[int, int], **style) -> None:
    """Words at a pixel counted from the upper left corner; `$` is no mathematics."""
    figure.text(x / size[0], 1 - y / size[1], words, **{"fontsize": 13, "parse_math": False, **style})
