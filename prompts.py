"""What the model is asked, and how its answer is written and read.

An answer (STVG-o1, Fig. 2) is text; nothing in the model changes:

    <time> 5 - 7 </time>
    <think_bbox> 5. [271, 30, 395, 212], 6. [267, 24, 393, 216], 7. [270, 18, 395, 221] </think_bbox>
    <pred_bbox> 5. [278, 35, 399, 234], 6. [289, 34, 403, 236], 7. [300, 28, 405, 237] </pred_bbox>

(on one line; broken here). Only this file knows how numbers are written. Inside the program boxes are (x1,
y1, x2, y2) floats in [0, 1] of the frame, and time is a *step*, a cell of the clip: step i covers the seconds
[i * d, (i + 1) * d) (samples.TimeGrid).
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise

from samples import Box, Truth

COORDINATES = ("norm1000", "resized", "original")
TIME_UNITS = ("frame", "second")


@dataclass(frozen=True)
class TextFormat:
    """How numbers are written. The first two choices are not in the paper (docs/assumptions.md)."""

    # norm1000: 0 to 1000 across the frame | resized: pixels the model sees | original: pixels of the file
    coordinates: str = "norm1000"
    time_unit: str = "frame"  # a step is one sampled frame (1 / fps seconds) or one "second"
    think: bool = True  # False: no <think_bbox> part, the row "RFT" of Table 5
    fps: float = 2.0  # frames per second that the model sees

    def __post_init__(self):
        for key, choices in {"coordinates": COORDINATES, "time_unit": TIME_UNITS}.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}")
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
        """Steps in so many frames, fps of them a second."""
        return math.ceil(frames / (self.fps * self.step_seconds) - 1e-6)

    def scale(self, shown: tuple[int, int], file: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that the text's coordinates are measured in, from the (width, height) in pixels of
        the frame that the model is shown and of the video file."""
        return {"norm1000": (1000, 1000), "resized": shown, "original": file}[self.coordinates]


# ----------------------------------------------------------------------------------------------------------
# The prompt (not in the paper, which shows none for its own model)


def build_prompt(sentence: str, num_steps: int, scale: tuple[int, int], text_format: TextFormat) -> str:
    """The text beside the video. The sentence comes last, so that prompts about one video share the rest.

    num_steps: of the clip. scale: (width, height) of the coordinates (TextFormat.scale).
    """
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


# ----------------------------------------------------------------------------------------------------------
# The answer

Items = tuple[tuple[int, Box], ...]  # ((step, (x1, y1, x2, y2)), ...), as an answer lists them


@dataclass(frozen=True)
class Answer:
    """An answer as it is written; nothing is sorted or repaired. Boxes are in the numbers of the text, or,
    after in_frame, in [0, 1]."""

    start: int
    end: int
    think: Items | None  # None without thinking
    pred: Items

    @property
    def span(self) -> tuple[int, int]:
        """First and last step, inclusive, as written: the last may come before the first."""
        return self.start, self.end

    @functools.cached_property
    def think_boxes(self) -> dict[int, Box]:
        """step -> box, in the answer's order; of a step that is named twice the first box counts."""
        return _first_of_each(self.think or ())

    @functools.cached_property
    def pred_boxes(self) -> dict[int, Box]:
        return _first_of_each(self.pred)

    def in_frame(self, scale: tuple[int, int]) -> "Answer":
        """The same answer with its boxes in [0, 1] of the frame, as rewards and metrics need it. scale:
        (width, height) of the text's coordinates."""

        def scaled(items: Items) -> Items:
            return tuple((step, from_text_box(box, scale)) for step, box in items)

        return replace(self, think=self.think and scaled(self.think), pred=scaled(self.pred))


def _first_of_each(items: Items) -> dict[int, Box]:
    boxes = {}
    for step, box in items:
        boxes.setdefault(step, box)
    return boxes


# The grammar, token by token, with or without space between them. Every quantifier is possessive ("*+"): the
# matcher never goes back, so it takes linear time for any text.
_NUMBER, _SPACE = "[0-9]{1,5}+", r"\s*+"
_ITEM = [_NUMBER, r"\.", r"\[", *[_NUMBER, ","] * 3, _NUMBER, r"\]"]
_OTHERS = f"(?:{_SPACE.join([*_ITEM, ','])}{_SPACE})*+"  # the items of a list before its last one
_TIME = ["<time>", _NUMBER, "-", _NUMBER, "</time>"]
_THINK, _PRED = ([f"<{name}>", _OTHERS, *_ITEM, f"</{name}>"] for name in ("think_bbox", "pred_bbox"))
_TOKENS = {True: [*_TIME, *_THINK, *_PRED, r"\Z"], False: [*_TIME, *_PRED, r"\Z"]}
_ANSWER = {think: re.compile(_SPACE + _SPACE.join(tokens)) for think, tokens in _TOKENS.items()}
_NAMES = {_NUMBER: "an integer from 0 to 99999", r"\Z": "the end", ",": "a comma", r"\.": "a full stop"}


def parse_answer(text: str, think: bool = True) -> Answer | None:
    """Read an answer (STVG-o1, section 3.1). Returns None if the text, stripped, is not of the form.

    Never raises; takes time linear in the text. Does not judge whether the numbers make sense.
    """
    if not _ANSWER[think].match(text):
        return None
    (start, end), *lists, _ = ([int(n) for n in re.findall("[0-9]+", part)] for part in text.split("</"))
    items = [tuple((n[k], tuple(n[k + 1 : k + 5])) for k in range(0, len(n), 5)) for n in lists]
    return Answer(start, end, items[0] if think else None, items[-1])


def where_it_fails(text: str, think: bool = True) -> str:
    """Where parse_answer gives up (characters count from 1), and what it expected there; "" if it does not.
    Never raises; takes time linear in the text."""
    place = len(text) - len(text.lstrip())
    for last, token in pairwise(["", *_TOKENS[think]]):
        if match := re.compile(token + _SPACE).match(text, place):
            place = match.end()
            continue
        expected = "a comma or " * (last == r"\]") + _NAMES.get(token, repr(token.replace("\\", "")))
        expected = "a box such as 5. [1, 2, 3, 4]" if last == _OTHERS else expected
        before, rest = text[:place].rstrip(), text[place:].rstrip()
        if not rest or (rest[0] == "<" and token.startswith(rest)):  # a tag may be cut off
            return f"the text ends after {text.rstrip()[-30:]!r}: {expected} was expected"
        after = f", after {before[-30:]!r}" if before else ""
        return f"at character {place + 1}{after}: {expected} was expected, found {rest[:30]!r}"
    return ""


def format_answer(answer: Answer) -> str:
    """Write an answer on one line, as in the paper: the inverse of parse_answer. Raises ValueError for what
    the grammar cannot say: an empty list, or a number that is not an integer from 0 to 99999."""
    text = f"<time> {answer.start:.0f} - {answer.end:.0f} </time>"
    for name, items in {"think_bbox": answer.think, "pred_bbox": answer.pred}.items():
        if items is not None:
            boxes = [f"{step:.0f}. [{', '.join(f'{v:.0f}' for v in box)}]" for step, box in items]
            text += f" <{name}> {', '.join(boxes)} </{name}>"
    if parse_answer(text, answer.think is not None) != answer:
        raise ValueError(
            f"{answer} cannot be written: a list is empty, or a number not an integer in 0 to 99999"
        )
    return text


def to_text_box(box: Box, scale: tuple[int, int]) -> Box:
    """A box in [0, 1] in the nearest integers of the text's scale (width, height)."""
    return tuple(round(value * scale[axis % 2]) for axis, value in enumerate(box))


def from_text_box(box: Box, scale: tuple[int, int]) -> Box:
    """A box of the text, divided by the scale (width, height) and clamped to [0, 1]."""
    return tuple(min(max(value / scale[axis % 2], 0.0), 1.0) for axis, value in enumerate(box))


def truth_answer(truth: Truth, scale: tuple[int, int], think: bool = True) -> Answer:
    """The answer that supervised fine-tuning teaches, and that scores the full reward.

    It lists every step of the span; a step without a true box takes that of the nearest step with one.
    """
    start, end = truth.span

    def box(i: int) -> Box:
        return truth.boxes.get(i) or truth.boxes[min(truth.boxes, key=lambda step: (abs(step - i), step))]

    items = tuple((i, to_text_box(box(i), scale)) for i in range(start, end + 1))
    return Answer(start, end, items if think else None, items)
