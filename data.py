"""Annotations to samples: one loader per official format, every repair counted, everything else an error.

    samples, report = load_samples("hcstvg", "train.json", "videos")
    print(format_report(report))

A sample is one sentence about one clip. Its truth is the box track, frame by frame as annotated; the
annotated seconds (HC-STVG's st_time, ed_time) disagree with the track by 8-10 frames and are not read.
"""

import codecs
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from prompts import Box, TimeGrid, Truth

HCSTVG_SECONDS = 20  # "the duration of all videos is 20 s": their only statement about the frame rate
DATASETS = ("hcstvg", "vidstg")
REMEDY = "correct or remove the record"


class DataError(ValueError):
    """Annotations that cannot be used; the message names the file, the record, the value and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One sentence and its tube. Native frames are the clip's own, counted from 0 at its first one."""

    id: str  # HC-STVG: the video's key in the annotation file
    video: str  # path of the file
    sentence: str  # as annotated, nothing repaired
    width: int  # of the file, in pixels
    height: int
    num_frames: int  # native frames of the clip
    fps: float  # native frames per second
    begin_frame: int  # the clip's first frame, counted in the whole file
    first_frame: int  # the truth is [first_frame, stop_frame) in native frames
    stop_frame: int
    boxes: dict[int, Box]  # native frame of the truth -> box in [0, 1]; a frame without one is not judged
    question_type: str | None = None  # VidSTG: "declarative" or "interrogative"

    def grid(self, step_seconds: float) -> TimeGrid:
        """The steps of the clip, each step_seconds long."""
        return TimeGrid(self.num_frames, self.fps, step_seconds)

    def truth(self, step_seconds: float) -> Truth:
        """The truth in steps: those whose sampled frame lies in it (at least one), with those frames' boxes.

        Where none of the sampled frames has a box (an event shorter than a step), the annotated box nearest
        in time to the first step stands in.
        """
        grid = self.grid(step_seconds)
        start, end = grid.steps_of(self.first_frame, self.stop_frame)
        frames = {step: grid.sampled_frame(step) for step in range(start, end + 1)}
        boxes = {step: self.boxes[frame] for step, frame in frames.items() if frame in self.boxes}
        if not boxes:
            boxes = {start: self.boxes[min(self.boxes, key=lambda frame: abs(frame - frames[start]))]}
        return Truth((start, end), boxes)


# What was repaired or dropped: reason -> ids of the samples concerned.
Report = dict[str, list[str]]
CLIPPED = "box partly outside the image: clipped"
SORTED = "box of negative width or height: corners sorted"
EMPTY = "box without area: frame left without a box"
CUT = "track goes on after the clip's end: cut"


def format_report(report: Report) -> str:
    """The repairs as a table: samples concerned, reason, the first few ids."""
    if not report:
        return "annotations: nothing to repair"
    width = max(map(len, report))
    rows = [f"{'samples':>9}  {'repair':<{width}}  ids"]
    for reason, ids in report.items():
        more = ", ..." if len(ids) > 3 else ""
        rows.append(f"{len(ids):>9}  {reason:<{width}}  {', '.join(ids[:3])}{more}")
    return "\n".join(rows)


def load_samples(
    dataset: str, annotations: str, videos: str, vidor: str | None = None
) -> tuple[list[Sample], Report]:
    """Read one annotation file of a data set ("hcstvg" or "vidstg").

    annotations: the JSON file. videos: the folder of the video files, which are not opened here
    (check_videos). vidor: the folder of the box tracks, VidSTG only. Returns the samples in the file's
    order, and what was repaired. Raises DataError.
    """
    if not annotations:
        raise DataError("train_annotations and eval_annotations must both name an annotation file")
    if dataset == "hcstvg":
        return load_hcstvg(annotations, videos)
    if dataset == "vidstg":
        raise DataError("dataset: vidstg is not supported yet; only hcstvg is")
    raise DataError(f"dataset: {dataset!r} is not one of {', '.join(DATASETS)}")


def check_videos(samples: list[Sample]) -> None:
    """Raise DataError if a video file is missing. (Separate: scoring predictions needs no videos.)"""
    paths = list(dict.fromkeys(sample.video for sample in samples))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        names = ", ".join(map(os.path.basename, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{os.path.dirname(missing[0]) or '.'}: {len(missing)} of {len(paths)} videos missing: {names};"
            " set `videos` to the folder that holds them, or remove their records"
        )


# ----------------------------------------------------------------------------------------------------------
# HC-STVG, v1 and v2


def load_hcstvg(annotations: str, videos: str) -> tuple[list[Sample], Report]:
    """Read HC-STVG annotations: a JSON object, file name of the video -> record, one sentence each.

    Both dialects, also mixed: the sentence is `caption` (v1) or `English` (v2), the size `width` and
    `height` (v1) or `img_size` = [H, W, 3] (v2). Both: `bbox`, a list of [x, y, w, h] in pixels, one per
    native frame; `st_frame`, the 1-based index of the first of them; `img_num`, the number of frames of the
    clip. The frame rate is img_num / 20 s; records of clips of another length may say `fps`, which is ours
    and not HC-STVG's.

    Returns the samples in the file's order, and what was repaired. Raises DataError.
    """
    records = _read_json(annotations)
    if not isinstance(records, dict):
        hint = "; a list of records is VidSTG's format" if isinstance(records, list) else ""
        raise DataError(f"{annotations}: is not a JSON object with video file names as keys{hint}")
    if not records:
        raise DataError(f"{annotations}: holds no records; choose an annotation file that does")
    report: Report = {}
    samples = [_hcstvg_sample(annotations, key, record, videos, report) for key, record in records.items()]
    return samples, report


def _hcstvg_sample(annotations: str, key: str, record: dict, videos: str, report: Report) -> Sample:
    where = f"{annotations}: record {key!r}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: {_short(record)} is not an object with bbox, st_frame, img_num, ...")
    sentence = record["English"] if "English" in record else _get(where, record, "caption")
    if not isinstance(sentence, str) or not sentence.strip():
        raise DataError(f"{where}: the sentence {_short(sentence)} is not a text")
    if "<|" in sentence:
        raise DataError(
            f"{where}: the sentence {_short(sentence)} holds '<|', the mark of Qwen's special tokens;"
            " remove it from the sentence"
        )
    size = record  # v1: width and height stand in the record itself
    if "img_size" in record:
        if not isinstance(record["img_size"], list) or len(record["img_size"]) < 2:
            raise DataError(f"{where}: img_size {_short(record['img_size'])} is not [height, width, 3]")
        size = dict(zip(("height", "width"), record["img_size"], strict=False))
    width, height = (_positive_integer(where, size, name) for name in ("width", "height"))
    num_frames = _positive_integer(where, record, "img_num")
    fps = _positive(where, record, "fps") if "fps" in record else num_frames / HCSTVG_SECONDS
    first = _positive_integer(where, record, "st_frame") - 1  # from 1-based to 0-based
    if first >= num_frames:
        raise DataError(
            f"{where}: st_frame {first + 1} lies after the end of the video (img_num {num_frames}); {REMEDY}"
        )
    track = _get(where, record, "bbox")
    if not isinstance(track, list) or not track:
        raise DataError(f"{where}: bbox {_short(track)} is not a list of at least one box; {REMEDY}")

    repairs = {CUT} if first + len(track) > num_frames else set()
    boxes = {}
    for frame, numbers in zip(range(first, num_frames), track, strict=False):
        box = _hcstvg_box(f"{where}: bbox[{frame - first}]", numbers, width, height, repairs)
        if box is not None:
            boxes[frame] = box
    if not boxes:
        raise DataError(f"{where}: bbox: no box has an area; {REMEDY}")
    for reason in sorted(repairs):
        report.setdefault(reason, []).append(key)
    return Sample(
        id=key,
        video=os.path.join(videos, key),
        sentence=sentence,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        begin_frame=0,
        first_frame=first,
        stop_frame=min(first + len(track), num_frames),
        boxes=boxes,
    )


def _hcstvg_box(where: str, numbers: list, width: int, height: int, repairs: set[str]) -> Box | None:
    """[x, y, w, h] in pixels -> box in [0, 1], None if it has no area; adds what it repaired to `repairs`."""
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise DataError(f"{where} {_short(numbers)} is not [x, y, width, height] in numbers; {REMEDY}")
    x, y, w, h = numbers
    if w == 0 or h == 0:
        repairs.add(EMPTY)
        return None
    if w < 0 or h < 0:
        repairs.add(SORTED)
    x1, x2 = sorted((x, x + w))
    y1, y2 = sorted((y, y + h))
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise DataError(f"{where} {_short(numbers)} lies outside the {width} x {height} video; {REMEDY}")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        repairs.add(CLIPPED)
    return max(x1, 0) / width, max(y1, 0) / height, min(x2, width) / width, min(y2, height) / height


# ----------------------------------------------------------------------------------------------------------
# Files: written whole, read with errors that say where


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed. Raises OSError with the errno, the
    reason (strerror) and the path (filename), which a full disk's own error lacks; what was there stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not even have come into being
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def read_jsonl(path: Path, *keys: str, skip_cut: bool = False) -> list[dict]:
    """The objects of a file with one on each line, in its order. Raises DataError that names the file and the
    line, for a file that cannot be read and for a line that is no JSON object with these keys.

    Lines end at newlines only: other line separators, such as U+2028, may stand in a JSON string. skip_cut:
    leave out a last line that has no newline and does not parse, which is what a run that was killed while
    it wrote leaves behind.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    whole = lines[-1] == b""  # what follows the last newline
    if whole:
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if skip_cut and not whole and number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            wanted = ", ".join(f'"{key}"' for key in keys)
            raise DataError(f"{path}, line {number}: is no JSON object with {wanted}; correct or remove it")
        records.append(record)
    return records


def _read_json(path: str) -> object:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=_unique)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # the message of a syntax error says line and column
        raise DataError(f"{path}: is not a JSON file: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. json itself would keep the last of two records with the same key, and say nothing."""
    record = {}
    for key, value in pairs:
        if key in record:
            raise DataError(f"the key {key!r} stands twice in one object; {REMEDY}")
        record[key] = value
    return record


def _get(where: str, record: dict, name: str) -> object:
    if name not in record:
        raise DataError(f"{where}: has no {name!r}; its keys are {', '.join(map(str, record)) or 'none'}")
    return record[name]


def _is_number(value: object) -> bool:
    """Whether it is a number that can be a pixel or a frame: JSON also has true, NaN and 10 ** 400."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _positive(where: str, record: dict, name: str) -> float:
    value = _get(where, record, name)
    if not _is_number(value) or value <= 0:
        raise DataError(f"{where}: {name} {_short(value)} is not a number above 0")
    return float(value)


def _positive_integer(where: str, record: dict, name: str) -> int:
    value = _get(where, record, name)
    if not _is_number(value) or value < 1 or value != int(value):
        raise DataError(f"{where}: {name} {_short(value)} is not an integer of at least 1")
    return int(value)


def _short(value: object) -> str:
    """A value as an error message quotes it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
