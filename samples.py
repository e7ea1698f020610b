"""The records that all parts share: a sentence with its clip, its true boxes, and time in steps.

Inside the program boxes are (x1, y1, x2, y2) floats in [0, 1] of the frame, and time is a *step*, a cell of
the clip: step i covers the seconds [i * d, (i + 1) * d) (class TimeGrid).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
QUESTION_TYPES = ("declarative", "interrogative")  # VidSTG's captions and questions


@dataclass(frozen=True)
class TimeGrid:
    """Convert between steps, seconds and native frames. All indices are 0-based."""

    num_frames: int  # native frames of the clip
    fps: float  # native frames per second
    step_seconds: float

    @property
    def num_steps(self) -> int:
        """Steps that begin before the clip ends."""
        return max(1, math.ceil(self.num_frames / self.fps / self.step_seconds - 1e-6))

    def sampled_frame(self, step: int) -> int:
        """The native frame on screen at the beginning of the step: the one its box belongs to."""
        return min(int(step * self.step_seconds * self.fps + 1e-6), self.num_frames - 1)

    def first_frame(self, step: int) -> int:
        """The first native frame f with f / fps >= step * d; step i covers first_frame(i) up to
        first_frame(i + 1), exclusive."""
        return min(math.ceil(step * self.step_seconds * self.fps - 1e-6), self.num_frames)

    def spans_near(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The spans (first and last step, inclusive) that begin at a step's edge next to that of the native
        frames [first, stop), and end likewise: up to four. The last edge is the clip's end."""

        def edges(frame: int) -> list[int]:  # edge i is where step i begins
            place = frame / self.fps / self.step_seconds
            return sorted({math.floor(place + 1e-6), math.ceil(place - 1e-6)})

        return [(begin, end - 1) for begin in edges(first) for end in edges(stop) if begin < end]

    def steps_of(self, first: int, stop: int) -> tuple[int, int]:
        """The span of at least one step whose edges are nearest to those of the native frames [first, stop).
        Of two that are equally near the longer one, which overlaps more. Not in the paper."""
        step_frames = self.step_seconds * self.fps

        def distance(span: tuple[int, int]) -> tuple[float, int]:
            begin, end = (min(i * step_frames, self.num_frames) for i in (span[0], span[1] + 1))
            longest_first = span[0] - span[1]
            return round(abs(begin - first) + abs(end - stop), 6), longest_first  # in native frames

        return min(self.spans_near(first, stop), key=distance)


@dataclass(frozen=True)
class Truth:
    """The true answer, in steps."""

    span: tuple[int, int]  # first and last step, inclusive
    boxes: dict[int, Box]  # step -> box in [0, 1]; a step of the span may have none

    def before(self, num_steps: int) -> "Truth | None":
        """The part below num_steps, as a video that ends early shows it; None if the event begins later. If
        its boxes do, the last step that is shown gets the first of them."""
        first, last = self.span[0], min(self.span[1], num_steps - 1)
        boxes = {step: box for step, box in self.boxes.items() if step <= last}
        return Truth((first, last), boxes or {last: self.boxes[min(self.boxes)]}) if first <= last else None


class Track(Mapping[int, Box]):
    """Boxes of consecutive native frames, frame -> box in [0, 1]; a frame without a box is no key.

    It reads like a dict, but is a view of an array: VidSTG's sentences share 20 million boxes, which would
    take 6 GB as tuples of floats.
    """

    def __init__(self, first: int, boxes: np.ndarray):
        """boxes: (frames, 4) float64; the first row is frame `first`; NaN where there is no box."""
        self.first, self.array = first, boxes
        self.there = ~np.isnan(boxes[:, 0])  # (frames,)

    def rows(self, frames: np.ndarray) -> np.ndarray:
        """The boxes of some frames, (N,) -> (N, 4); NaN where there is none."""
        places = frames - self.first
        found = np.full((len(frames), 4), np.nan)
        inside = (places >= 0) & (places < len(self.array))
        found[inside] = self.array[places[inside]]
        return found

    def __getitem__(self, frame: int) -> Box:
        k = frame - self.first if isinstance(frame, int | np.integer) else -1
        if not (0 <= k < len(self.array) and self.there[k]):
            raise KeyError(frame)
        return tuple(self.array[k].tolist())

    def __iter__(self) -> Iterator[int]:
        return iter((self.there.nonzero()[0] + self.first).tolist())

    def __len__(self) -> int:
        return int(self.there.sum())


@dataclass(frozen=True)
class Sample:
    """One sentence and its tube. Native frames are the clip's own, counted from 0 at its first one."""

    id: str  # HC-STVG: the video's key in the annotation file; VidSTG: RECORD/captions|questions/INDEX
    video: str  # path of the file
    sentence: str  # as annotated, nothing repaired
    width: int  # of the file, in pixels
    height: int
    num_frames: int  # native frames of the clip
    fps: float  # native frames per second
    begin_frame: int  # the clip's first frame, counted in the whole file
    file_frames: int  # native frames of the whole file
    first_frame: int  # the truth is [first_frame, stop_frame) in native frames
    stop_frame: int
    boxes: Track  # native frame of the truth -> box in [0, 1]; one without a box is not judged
    question_type: str | None = None  # VidSTG: one of QUESTION_TYPES

    def grid(self, step_seconds: float) -> TimeGrid:
        """The steps of the clip, each step_seconds long."""
        return TimeGrid(self.num_frames, self.fps, step_seconds)

    def truth(self, step_seconds: float, span: tuple[int, int] | None = None) -> Truth:
        """The truth in steps. span: the steps that stand for the true span; None: TimeGrid.steps_of.

        The box of a step is that of its sampled frame; where the truth begins later in the step, that of the
        truth's first frame. If none of these frames has a box, the first step gets the annotated box nearest
        to it in time.
        """
        grid = self.grid(step_seconds)
        start, end = span or grid.steps_of(self.first_frame, self.stop_frame)
        frames = {i: max(grid.sampled_frame(i), self.first_frame) for i in range(start, end + 1)}
        boxes = {step: self.boxes[frame] for step, frame in frames.items() if frame in self.boxes}
        if not boxes:
            boxes = {start: self.boxes[min(self.boxes, key=lambda frame: abs(frame - frames[start]))]}
        return Truth((start, end), boxes)
