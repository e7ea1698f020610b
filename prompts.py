"""The language between the program and the model: the prompt, and the answer in both directions.

An answer (STVG-o1, Fig. 2) is text, nothing in the model changes:

    <time> 5 - 7 </time>
    <think_bbox> 5. [271, 30, 395, 212], 6. [267, 24, 393, 216], 7. [270, 18, 395, 221] </think_bbox>
    <pred_bbox> 5. [278, 35, 399, 234], 6. [289, 34, 403, 236], 7. [300, 28, 405, 237] </pred_bbox>

(in one line; broken here). Only this file knows how numbers are written. Inside the program boxes are
(x1, y1, x2, y2) floats in [0, 1] of the frame, and time is a *step*, a cell of the clip: step i covers the
seconds [i * d, (i + 1) * d) (class TimeGrid).
"""

import functools
import math
import re
from dataclasses import dataclass, replace

from samples import Box, Truth

COORDINATES = ("norm1000", "resized", "original")
TIME_UNITS = ("frame", "second")
ANSWER_FORMATS = ("boxes", "csv")


# ----------------------------------------------------------------------------------------------------------
# The choices of how answers are written


@dataclass(frozen=True)
class TextFormat:
    """How numbers stand in the text. The first two choices are not in the paper (README, "Assumptions")."""

    # norm1000: 0 to 1000 across the frame | resized: pixels the model sees | original: pixels of the file
    # | relative: decimals from 0 to 1, in csv only
    coordinates: str = "norm1000"
    time_unit: str = "frame"  # a step is one sampled frame (1 / fps seconds) or one "second"
    think: bool = True  # False: no <think_bbox> part, the "RFT" row of Table 5
    fps: float = 2.0  # frames per second that the model sees
    answer_format: str = "boxes"  # or "csv": what the paper asks of closed models (Fig. 8), not to train on

    def __post_init__(self):
        if self.answer_format not in ANSWER_FORMATS:
            names = ", ".join(ANSWER_FORMATS)
            raise ValueError(f"answer_format: {self.answer_format!r} is not one of {names}")
        if self.answer_format == "csv":
            if (self.coordinates, self.time_unit, self.think) != ("relative", "second", False):
                raise ValueError(
                    "answer_format: csv needs coordinates: relative, time_unit: second and think: false, not"
                    f" {self.coordinates}, {self.time_unit}, {str(self.think).lower()}"
                )
        elif self.coordinates not in COORDINATES:
            raise ValueError(f"coordinates: {self.coordinates!r} is not one of {', '.join(COORDINATES)}")
        if self.time_unit not in TIME_UNITS:
            raise ValueError(f"time_unit: {self.time_unit!r} is not one of {', '.join(TIME_UNITS)}")
        if not self.fps > 0:
            raise ValueError(f"fps: {self.fps!r} must be above 0")
        if self.time_unit == "second" and not float(self.fps).is_integer():  # else steps begin between frames
            raise ValueError(
                f"fps: {self.fps:g} with time_unit: second must be a whole number of frames per second; write"
                " one, such as fps: 2, or time_unit: frame"
            )

    @property
    def step_seconds(self) -> float:
        """Length d of a step in seconds."""
        return 1 / self.fps if self.time_unit == "frame" else 1.0

    def num_steps(self, frames: int) -> int:
        """Steps that so many frames, fps of them a second, show."""
        return math.ceil(frames / (self.fps * self.step_seconds) - 1e-6)

    def scale(self, shown: tuple[int, int], file: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that the text's coordinates are measured in, from the (width, height) in pixels of
        the frame that the model is shown and of the video file."""
        scales = {"norm1000": (1000, 1000), "resized": shown, "original": file, "relative": (1, 1)}
        return scales[self.coordinates]


# ----------------------------------------------------------------------------------------------------------
# The truth and the answer


Items = tuple[tuple[int, Box], ...]  # ((step, (x1, y1, x2, y2)), ...), as an answer lists them


@dataclass(frozen=True)
class Answer:
    """What stands in an answer: nothing is sorted or repaired. Its boxes are in the numbers of the text, or,
    after in_frame, in [0, 1]."""

    start: int
    end: int
    think: Items | None  # None without thinking
    pred: Items

    @property
    def span(self) -> tuple[int, int]:
        """First and last step, inclusive, as the answer names them: the last may come before the first."""
        return self.start, self.end

    @functools.cached_property
    def think_boxes(self) -> dict[int, Box]:
        """step -> box, in the answer's order; of a step that is named twice the first box counts. Empty
        without thinking."""
        return _first_of_each(self.think or ())

    @functools.cached_property
    def pred_boxes(self) -> dict[int, Box]:
        return _first_of_each(self.pred)

    def in_frame(self, scale: tuple[int, int]) -> "Answer":
        """The same answer with its boxes in [0, 1] of the frame: what rewards and metrics judge. scale:
        (width, height) that the text's coordinates are measured in (TextFormat.scale)."""

        def scaled(items: Items) -> Items:
            return tuple((step, from_text_box(box, scale)) for step, box in items)

        return replace(self, think=self.think and scaled(self.think), pred=scaled(self.pred))


def _first_of_each(items: Items) -> dict[int, Box]:
    boxes = {}
    for step, box in items:
        boxes.setdefault(step, box)
    return boxes


# Every quantifier is possessive ("*+"): the matcher never goes back, so time is linear in any text.
_NUMBER = r"[0-9]{1,5}+"
_BOX = r"\s*+,\s*+".join([_NUMBER] * 4)
_ITEM = rf"{_NUMBER}\s*+\.\s*+\[\s*+{_BOX}\s*+\]"
_LIST = rf"{_ITEM}(?:\s*+,\s*+{_ITEM})*+"
_TIME = rf"<time>\s*+({_NUMBER})\s*+-\s*+({_NUMBER})\s*+</time>"
_THINK = rf"<think_bbox>\s*+({_LIST})\s*+</think_bbox>"
_PRED = rf"<pred_bbox>\s*+({_LIST})\s*+</pred_bbox>"
_ANSWER = {True: re.compile(rf"{_TIME}\s*+{_THINK}\s*+{_PRED}"), False: re.compile(rf"{_TIME}\s*+{_PRED}")}
_INTEGER = re.compile(r"[0-9]+")


def parse_answer(text: str, think: bool = True) -> Answer | None:
    """Take an answer apart (STVG-o1, section 3.1); None where the whole stripped text is not of the form.

    Never raises and takes time linear in the text. Says nothing about whether the numbers make sense.
    """
    match = _ANSWER[think].fullmatch(text.strip())
    if match is None:
        return None
    start, end, *lists = match.groups()
    *think_items, pred_items = [_parse_list(items) for items in lists]
    return Answer(int(start), int(end), think_items[0] if think else None, pred_items)


def _parse_list(items: str) -> Items:
    """A text that has matched _LIST: "5. [271, 30, 395, 212], ..." -> ((5, (271, 30, 395, 212)), ...)."""
    numbers = [int(number) for number in _INTEGER.findall(items)]
    return tuple((numbers[k], tuple(numbers[k + 1 : k + 5])) for k in range(0, len(numbers), 5))


# The clock of a chat model: 5, 5.0, 5s, 0:05, 00:00:05. Not in the middle of a longer number.
_CLOCK = r"(?<![0-9:.])((?:[0-9]{1,2}:){1,2}[0-9]{2}|[0-9]{1,5})(?:\.[0-9]{1,20})?(?![0-9:])"
_UNIT = r"\s{0,9}(?:s|secs?|seconds?)?\s{0,9}"
_INTERVAL = re.compile(
    rf"start[^0-9]{{1,9}}{_CLOCK}[^0-9]{{1,20}}end[^0-9]{{1,9}}{_CLOCK}"
    rf"|{_CLOCK}{_UNIT}(?:-|to|and)\s{{0,9}}{_CLOCK}"
    rf"|[\[(]{_CLOCK}{_UNIT},\s{{0,9}}{_CLOCK}{_UNIT}[\])]",
    re.IGNORECASE,
)
_NUMBER_OF_ROW = re.compile(r"-?(?:[0-9]{1,5}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212~\u2192", "-"))
_BRACKETS = str.maketrans("", "", "[](){}\"'`*\u2022")


def parse_csv_answer(text: str) -> Answer | None:
    """Take the answer of a chat model apart: an interval in seconds, then lines `timestamp, x1, y1, x2, y2`
    (Fig. 8; how the authors parsed it is not in the paper). None where either is missing.

    Chat models talk, and write tables: lines that are neither are passed over, brackets, quotes and bars
    around the numbers too, and so is what stands before "</think>". The interval is the last one before the
    first row. Timestamps are cut to whole seconds; of two boxes in one second the first counts. Never raises
    and takes time linear in the text.
    """
    interval, items = None, {}
    for line in filter(str.strip, text.rpartition("</think>")[2].translate(_DASHES).splitlines()):
        if row := _csv_row(line):
            second, box = row
            items.setdefault(second, box)
        elif not items and (found := _INTERVAL.findall(line[:1000])):
            interval = [_seconds(clock) for clock in found[-1] if clock]
    if interval is None or not items:
        return None
    return Answer(*interval, None, tuple(items.items()))


def _csv_row(line: str) -> tuple[int, Box] | None:
    """(second, box) of a line of a table with five columns of numbers, None for any other line."""
    line = line.translate(_BRACKETS).strip().removeprefix("- ")
    cells = [cell.strip() for cell in re.split(r"[,;|\t]", line.strip(" ,;|\t"))]
    clock = re.fullmatch(_CLOCK + _UNIT, cells[0], re.IGNORECASE)
    if len(cells) != 5 or not clock or not all(map(_NUMBER_OF_ROW.fullmatch, cells[1:])):
        return None
    return _seconds(clock[1]), tuple(map(float, cells[1:]))


def _seconds(clock: str) -> int:
    """5 or 0:05 or 00:00:05 -> 5."""
    return sum(int(part) * 60**k for k, part in enumerate(reversed(clock.lap(":"))))


def read_answer(text: str, text_format: TextFormat) -> Answer | None:
    """Take an answer apart as its format asks."""
    if text_format.answer_format == "csv":
        return parse_csv_answer(text)
    return parse_answer(text, text_format.think)


def format_answer(answer: Answer) -> str:
    """The text of an answer, on one line as in the paper: the inverse of parse_answer.

    Raises ValueError where no text of the grammar says this: an empty list, or a number that is not a
    non-negative integer of at most five digits.
    """
    parts = [f"<time> {_digits(answer.start)} - {_digits(answer.end)} </time>"]
    if answer.think is not None:
        parts.append(f"<think_bbox> {_format_list(answer.think)} </think_bbox>")
    parts.append(f"<pred_bbox> {_format_list(answer.pred)} </pred_bbox>")
    return " ".join(parts)


def _format_list(items: Items) -> str:
    if not items:
        raise ValueError("an answer needs at least one box in each list")
    return ", ".join(f"{_digits(step)}. [{', '.join(_digits(v) for v in box)}]" for step, box in items)


def _digits(number: int) -> str:
    if not (0 <= number <= 99999 and number == int(number)):
        raise ValueError(f"{number!r} cannot be written: answers hold integers from 0 to 99999")
    return str(int(number))


def to_text_box(box: Box, scale: tuple[int, int]) -> Box:
    """A box in [0, 1] -> the nearest integers of the text's scale (width, height)."""
    return tuple(round(value * scale[axis % 2]) for axis, value in enumerate(box))


def from_text_box(box: Box, scale: tuple[int, int]) -> Box:
    """A box of the text -> divided by the scale (width, height) and clamped to [0, 1]."""
    return tuple(min(max(value / scale[axis % 2], 0.0), 1.0) for axis, value in enumerate(box))


def truth_answer(truth: Truth, scale: tuple[int, int], think: bool = True) -> Answer:
    """The answer that says the truth: what supervised fine-tuning teaches, and what scores the full reward.

    An answer lists every step of its span: a step without a box borrows that of the nearest one with.
    """
    start, end = truth.span
    nearest = {i: min(truth.boxes, key=lambda step: (abs(step - i), step)) for i in range(start, end + 1)}
    items = tuple((i, to_text_box(truth.boxes[nearest[i]], scale)) for i in nearest)
    return Answer(start, end, items if think else None, items)


# ----------------------------------------------------------------------------------------------------------
# The prompt (not in the paper, which shows none for its own model)


def build_prompt(sentence: str, num_steps: int, scale: tuple[int, int], text_format: TextFormat) -> str:
    """The user's words beside the video. The sentence comes last: prompts of one video share the rest."""
    if text_format.answer_format == "csv":
        return build_csv_prompt(sentence)
    where = {
        "norm1000": "x and y go from 0 to 1000 across the frame",
        "resized": f"x and y are pixels of the {scale[0]} x {scale[1]} frames shown",
        "original": f"x and y are pixels of the {scale[0]} x {scale[1]} video file",
    }[text_format.coordinates]
    boxes = "S. [x1, y1, x2, y2], ..., E. [x1, y1, x2, y2]"
    think = f"<think_bbox> {boxes} </think_bbox> " if text_format.think else ""
    draft = "first as a draft, then corrected, " if text_format.think else ""
    return (
        f"The video has {text_format.fps:g} frames per second and {num_steps} steps of"
        f" {text_format.step_seconds:g} s, numbered 0 to {num_steps - 1}."
        " Find the first step S and the last step E of the event below, and one box [x1, y1, x2, y2] of its"
        f" subject in every step, {draft}where {where}."
        f" Answer in this form: <time> S - E </time> {think}<pred_bbox> {boxes} </pred_bbox>\n"
        f"Event: {sentence}"
    )


def build_csv_prompt(sentence: str) -> str:
    """The words for a chat model that was not trained for this: what the paper's Fig. 8 asks of closed models
    (whole seconds from 0, an interval, then CSV in relative coordinates, at most 30 boxes), in our words."""
    return (
        "Find when the event below happens in the video, and where its subject is. First write the interval"
        " as START - END, in whole seconds from the beginning of the video, which is second 0. Then write CSV"
        " with the header timestamp, x1, y1, x2, y2 and a line for each second of the interval, at most 30 of"
        " them: the second, and the box around the subject, its top left and its bottom right corner, each"
        " coordinate as a decimal from 0 to 1 of the frame's width or height. Write nothing else.\n"
        f"Event: {sentence}"
    )
