"""Annotations to samples: one loader for each official format. Every repaired or dropped sample is counted.

    samples, report = load_samples("vidstg", "val_annotations.json", "videos", "vidor")
    print(format_report(report))

A sample is one sentence about one clip. Its truth is the track of boxes, frame by frame as annotated. (The
st_time and ed_time of HC-STVG disagree with the track by 8-10 frames and are not read.) Sentences are used as
they are. A record that breaks its format is an error, "FILE: record ID: KEY is VALUE, must be ...".
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from runtime.files import REMEDY, DataError, few, file_and_split, get, is_number, read_json, read_jsonl, short
from samples import QUESTION_TYPES, Sample, Track
from video.loader import read_headers

HCSTVG_SECONDS = 20  # "the duration of all videos is 20 s": their only statement about the frame rate

# What was found, and what was done about it: finding -> ids of the samples.
Report = dict[str, list[str]]
CLIPPED = "box partly outside the image: clipped"
SORTED = "box with a negative side: corners sorted"
EMPTY = "box without area: left out"
OUTSIDE = "box outside the image: left out"  # in VidSTG; elsewhere it is an error
CUT = "span leaves the clip: cut"
CUT_SEGMENT = "segment leaves the video: cut"
OTHER_SIZE = "size is not VidOR's, in which the boxes are measured"
UNBOXED = "frames of the span without a box: not judged"
NO_BOX = "no box of the target in the span: sentence dropped"
NO_SPAN = "no frame of the span in the clip: sentence dropped"
DROPS = (NO_BOX, NO_SPAN)


def format_report(report: Report, all_drops: bool = False) -> str:
    """The findings as a table with the first few ids; with all_drops the ids of all dropped sentences."""
    if not report:
        return "nothing to repair"
    width = max(map(len, report))
    rows = [f"{'samples':>9}  {'finding':<{width}}  ids"]
    for finding, ids in report.items():
        shown = ", ".join(ids) if all_drops and finding in DROPS else few(ids)
        rows.append(f"{len(ids):>9}  {finding:<{width}}  {shown}")
    return "\n".join(rows)


def count_sentences(samples: list[Sample], report: Report) -> str:
    """How many sentences of a file are used, and of which type, as a text."""
    text = f"{len(samples)} sentence{'s' * (len(samples) != 1)}"
    types = [sum(sample.question_type == kind for sample in samples) for kind in QUESTION_TYPES]
    if any(types):
        text += f" ({', '.join(f'{n} {kind}' for n, kind in zip(types, QUESTION_TYPES, strict=True))})"
    dropped = sum(len(report.get(finding, [])) for finding in DROPS)
    return text + (f" of {len(samples) + dropped}, the others dropped" if dropped else "")


def load_samples(dataset: str, annotations: str, videos: str, vidor: str = "") -> tuple[list[Sample], Report]:
    """Read one annotation file of a data set ("hcstvg", "vidstg" or "jsonl").

    annotations: the file. videos: the folder of the video files, which are not opened, except for the sizes
    that lines of "jsonl" leave out. vidor: the folder of the box tracks (VidSTG only). Returns the samples in
    the file's order and the report. Raises DataError, and VideoError for a video that is opened.
    """
    if not annotations:
        raise DataError("no annotation file is named: set eval_annotations, and train_annotations to train")
    if dataset == "hcstvg":
        return load_hcstvg(annotations, videos)
    if dataset == "jsonl":
        return load_jsonl(annotations, videos)
    if not vidor:
        raise DataError("dataset: vidstg needs `vidor`, the folder of VidOR's annotations with the boxes")
    return load_vidstg(annotations, videos, vidor)


def missing_videos(samples: list[Sample]) -> list[str]:
    """Paths of the samples' video files that do not exist."""
    return [path for path in dict.fromkeys(s.video for s in samples) if not os.path.isfile(path)]


def check_videos(samples: list[Sample]) -> None:
    """Raise DataError if a video file is missing. (load_samples does not: scoring predictions needs none.)"""
    if missing := missing_videos(samples):
        count = len({sample.video for sample in samples})
        names = few([os.path.basename(path) for path in missing])
        raise DataError(
            f"{os.path.dirname(missing[0]) or '.'}: {len(missing)} of {count} videos missing: {names};"
            " set `videos` to the folder that holds them, remove their records, or write on_bad_video: skip"
        )


class VideoFolder:
    """The videos of a folder by the names that annotations give them."""

    ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".y4m")

    def __init__(self, folder: str):
        self.folder = folder

    def path(self, where: str, name: str) -> str:
        """FOLDER/NAME, or if there is no such file the one video anywhere below FOLDER whose path ends with
        NAME but for the ending, such as FOLDER/0/122_abc.mkv for 122_abc.mp4. If there is none, FOLDER/NAME.
        Raises DataError if there are several."""
        path = os.path.join(self.folder, name)
        if os.path.isfile(path):
            return path
        stem = os.path.splitext(name)[0]
        found = [
            other
            for other in self._by_stem.get(os.path.basename(stem), ())
            if f"/{os.path.splitext(os.path.relpath(other, self.folder))[0]}".endswith(f"/{stem}")
        ]
        if len(found) > 1:
            raise DataError(f"{where}: both {found[0]} and {found[1]} may be its video; keep one of them")
        return found[0] if found else path

    @functools.cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Name without its ending -> the videos below the folder that are called so, sorted."""
        found: dict[str, list[str]] = {}
        for folder, _, names in os.walk(self.folder, followlinks=True):
            for stem, ending in map(os.path.splitext, names):
                if ending.lower() in self.ENDINGS:
                    found.setdefault(stem, []).append(os.path.join(folder, stem + ending))
        return {stem: sorted(paths) for stem, paths in found.items()}


NO_TEXT = re.compile("<\\||\\0|[\ud800-\udfff]")
Kind = tuple[str, Callable[[object], bool]]  # what a value must be: in words, and as a test
COUNT: Kind = ("a whole number from 1 to 1000000", lambda v: is_number(v) and 1 <= v <= 1e6 and v == int(v))
RATE: Kind = ("a number above 0 and up to 1000", lambda v: is_number(v) and 0 < v <= 1000)
INTEGER: Kind = ("a whole number", lambda v: type(v) is int)  # True is none
FRAME: Kind = ("a frame, counted from 0", lambda v: type(v) is int and v >= 0)
SECONDS: Kind = ("at most 3600: no model can be shown more", lambda v: v <= 3600)
# "<|" begins Qwen's special tokens; half a surrogate pair (JSON's \ud83d alone) cannot be encoded.
TEXT: Kind = (
    "a text of at most 2000 characters, without '<|', NUL or half a surrogate pair",
    lambda v: isinstance(v, str) and bool(v.strip()) and len(v) <= 2000 and not NO_TEXT.search(v),
)
PATH: Kind = (
    "a printable path below `videos`",
    lambda v: TEXT[1](v) and v.isprintable() and not {"", ".."} & set(v.split("/")),
)
LIST: Kind = ("a list", lambda v: isinstance(v, list))
OBJECT: Kind = ("an object", lambda v: isinstance(v, dict))
FLAG: Kind = ("true or false", lambda v: isinstance(v, bool))
PERIOD: Kind = (
    "[begin, end] in seconds, 0 <= begin < end",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_number, v)) and 0 <= v[0] < v[1],
)
TIMED_BOX: Kind = (
    "[t, x1, y1, x2, y2]",
    lambda v: isinstance(v, list) and len(v) == 5 and all(map(is_number, v)),
)
BOX: Kind = ("[x, y, w, h]", lambda v: isinstance(v, list) and len(v) == 4 and all(map(is_number, v)))


def _wrong(place: str, value, wanted: str) -> DataError:
    return DataError(f"{place} is {short(value)}, must be {wanted}; {REMEDY}")


def _check(place: str, value, kind: Kind):
    """The value, if it is of this kind. Raises DataError."""
    wanted, fits = kind
    if not fits(value):
        raise _wrong(place, value, wanted)
    return value


def _read(where: str, record: dict, key: str, kind: Kind):
    """record[key], if it is of this kind. Raises DataError."""
    return _check(f"{where}: {key}", get(where, record, key), kind)


def _read_records(annotations: str, container: type) -> dict | list:
    """The records of an annotation file, of which there is at least one. Raises DataError."""
    records = read_json(annotations)
    if not isinstance(records, container) or not records:
        formats = "hcstvg: a JSON object, video -> record; vidstg: a JSON list of records"
        raise DataError(f"{annotations}: holds no records as `dataset` says ({formats})")
    for key, record in records.items() if container is dict else enumerate(records):
        _check(f"{annotations}: record {key!r}", record, OBJECT)
    return records


def load_hcstvg(annotations: str, videos: str) -> tuple[list[Sample], Report]:
    """Read HC-STVG annotations: a JSON object, file name of the video -> record, one sentence each.

    Both dialects, also mixed: the sentence is `caption` (v1) or `English` (v2), the size is `width` and
    `height` (v1) or `img_size` = [H, W, 3] (v2). Both: `bbox`, a list of [x, y, w, h] in pixels, one per
    native frame; `st_frame`, the 1-based index of the first of them; `img_num`, the number of frames of the
    clip. The frame rate is img_num / 20 s; a record of a clip of another length may say `fps`, which is ours
    and not HC-STVG's. Returns the samples in the file's order and the report. Raises DataError.
    """
    report: Report = {}
    records, folder = _read_records(annotations, dict).items(), VideoFolder(videos)
    return [_hcstvg_sample(annotations, key, record, folder, report) for key, record in records], report


def _hcstvg_sample(annotations: str, key: str, record: dict, videos: VideoFolder, report: Report) -> Sample:
    where = f"{annotations}: record {key!r}"
    _check(f"{where}: its key", key, PATH)
    sentence = _read(where, record, "English" if "English" in record else "caption", TEXT)
    size = record  # v1: width and height stand in the record itself
    if "img_size" in record:
        size = dict(zip(("height", "width"), _read(where, record, "img_size", LIST), strict=False))
    width, height = (int(_read(where, size, side, COUNT)) for side in ("width", "height"))
    num_frames = int(_read(where, record, "img_num", COUNT))
    fps = float(_check(f"{where}: fps", record.get("fps", num_frames / HCSTVG_SECONDS), RATE))
    _check(f"{where}: its length in seconds, img_num / fps,", num_frames / fps, SECONDS)
    first = int(_read(where, record, "st_frame", COUNT)) - 1  # from 1-based to 0-based
    if first >= num_frames:
        raise _wrong(f"{where}: st_frame", first + 1, f"at most img_num, {num_frames}")
    bbox = _read(where, record, "bbox", LIST)
    for k, numbers in enumerate(bbox):
        _check(f"{where}: bbox[{k}]", numbers, BOX)

    findings = {CUT} if first + len(bbox) > num_frames else set()
    bbox = bbox[: num_frames - first]
    corners = np.array(bbox, dtype=np.float64).reshape(-1, 4)  # (frames, 4)
    corners[:, 2:] += corners[:, :2]
    boxes, found = _in_frame(corners, width, height)
    findings |= {finding for finding, frames in found.items() if frames.any()}
    _refuse_outside(f"{where}: bbox", bbox, found, width, height)
    track = Track(first, boxes)
    if not track:
        raise _wrong(f"{where}: bbox", bbox, "boxes of which at least one has an area")
    for finding in sorted(findings):
        report.setdefault(finding, []).append(key)
    return Sample(
        id=key,
        video=videos.path(where, key),
        sentence=sentence,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        begin_frame=0,
        file_frames=num_frames,
        first_frame=first,
        stop_frame=first + len(bbox),
        boxes=track,
    )


LINE_KEYS = ("video", "sentence", "begin", "end", "boxes")  # of every line of a jsonl file
SIZE_KEYS = ("width", "height", "frames", "fps")  # of one whose video need not be opened


def load_jsonl(annotations: str, videos: str) -> tuple[list[Sample], Report]:
    """Read annotations of your own: one JSON object a line for one sentence; several may name one video.

        {"video": "a.mp4", "sentence": "...", "begin": 2.5, "end": 6, "boxes": [[2.5, x1, y1, x2, y2], ...]}

    Times are seconds of the file; the event is [begin, end). Boxes stand at times of the event, in rising
    order, in pixels or, with "normalized": true, in [0, 1]. Between two of them boxes are interpolated
    linearly; before the first and after the last they are held. Optional keys: "clip": [begin, end], the part
    of the file that is shown (all of it); "id" (VIDEO:NUMBER OF THE LINE); "split"; and "width", "height",
    "frames" and "fps" of the file, all four, without which its header is read.

    annotations: FILE.jsonl, or FILE.jsonl:SPLIT for the lines of that split. Returns the samples in the order
    of the file, and the report. Raises DataError, and VideoError for a header that cannot be read.
    """
    file, split = file_and_split(annotations)
    folder, report, lines = VideoFolder(videos), {}, {}  # lines: id -> (place, path of the video, record)
    for n, record in enumerate(read_jsonl(file, *LINE_KEYS), 1):
        where = f"{file}: record {n}"
        if split and _read(where, record, "split", TEXT) != split:
            continue
        video = _read(where, record, "video", PATH)
        key = _check(f"{where}: id", record.get("id", f"{video}:{n}"), TEXT)
        if key in lines:
            raise DataError(f"{where}: {lines[key][0]} has the same id {key!r}; change one of them")
        lines[key] = where, folder.path(where, video), record
    if not lines:
        of_split = f" of the split {split!r}" if split else ""
        raise DataError(f"{file}: holds no sentence{of_split}; name another file or split")
    paths = {path for _, path, record in lines.values() if not record.keys() >= set(SIZE_KEYS)}
    if missing := sorted(path for path in paths if not os.path.isfile(path)):
        raise DataError(
            f"{file}: {len(missing)} of its videos are missing: {few(missing)}; set `videos` to the folder"
            f" that holds them, or write {', '.join(SIZE_KEYS)} of the video into the lines"
        )
    headers = read_headers(sorted(paths)) if paths else {}
    return [_jsonl_sample(key, *line, headers, report) for key, line in lines.items()], report


def _jsonl_sample(key: str, where: str, path: str, record: dict, headers: dict, report: Report) -> Sample:
    if header := headers.get(path):
        width, height, file_frames, fps = header.width, header.height, header.frames, header.fps
    else:
        width, height, file_frames = (int(_read(where, record, k, COUNT)) for k in SIZE_KEYS[:3])
        fps = float(_read(where, record, "fps", RATE))
    shown = _check(f"{where}: clip", record.get("clip", [0, file_frames / fps]), PERIOD)
    begin_frame = round(shown[0] * fps)
    # Rounded down: 6 s at 29.97 frames a second are 6 steps of a second, not 7.
    stop_of_clip = min(begin_frame + int((shown[1] - shown[0]) * fps + 1e-3), file_frames)
    _check(f"{where}: the length of its clip in seconds", (stop_of_clip - begin_frame) / fps, SECONDS)
    event = _check(f"{where}: [begin, end]", [record["begin"], record["end"]], PERIOD)
    first, stop = round(event[0] * fps), max(round(event[1] * fps), round(event[0] * fps) + 1)
    findings = {CUT} if first < begin_frame or stop > stop_of_clip else set()
    first, stop = max(first, begin_frame), min(stop, stop_of_clip)
    if first >= stop:
        raise _wrong(f"{where}: [begin, end]", event, f"in the clip, {shown} s of the file")
    size = (1, 1) if _read(where, {"normalized": False} | record, "normalized", FLAG) else (width, height)
    times, boxes, found = _timed_boxes(f"{where}: boxes", _read(where, record, "boxes", LIST), event, size)
    for finding in sorted(findings | {finding for finding, which in found.items() if which.any()}):
        report.setdefault(finding, []).append(key)
    sides = [np.interp(np.arange(first, stop) / fps, times, side) for side in boxes.T]
    return Sample(
        id=key,
        video=path,
        sentence=_read(where, record, "sentence", TEXT),
        width=width,
        height=height,
        num_frames=stop_of_clip - begin_frame,
        fps=fps,
        begin_frame=begin_frame,
        file_frames=file_frames,
        first_frame=first - begin_frame,
        stop_frame=stop - begin_frame,
        boxes=Track(first - begin_frame, np.stack(sides, axis=1)),
    )


def _timed_boxes(
    place: str, rows: list, event: list[float], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """[t, x1, y1, x2, y2], ... -> times (N,), boxes (N, 4) in [0, 1], and what _in_frame found. Those without
    area are left out. size: what the boxes are measured in. Raises DataError."""
    before = event[0]
    for k, row in enumerate(rows):
        time, *_ = _check(f"{place}[{k}]", row, TIMED_BOX)
        if not before <= time <= event[1] or (k and time == before):
            raise _wrong(
                f"{place}[{k}]", row, f"at a time from {event[0]} to {event[1]} s, after the one before"
            )
        before = time
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    if len(rows) and (table[:, 1:].max() > 1.5) == (size == (1, 1)):  # the unit is forgotten, or wrong
        raise _wrong(place, rows, 'in pixels, or in [0, 1] with "normalized": true')
    boxes, found = _in_frame(table[:, 1:], *size)
    _refuse_outside(place, rows, found, *size)
    kept = ~np.isnan(boxes[:, 0])
    if not kept.any():
        raise _wrong(place, rows, "boxes of which at least one has an area")
    return table[kept, 0], boxes[kept], found


def load_vidstg(annotations: str, videos: str, vidor: str) -> tuple[list[Sample], Report]:
    """Read VidSTG annotations, a JSON list of records, and the box tracks of their videos from VidOR's files.

    One sample is one of a record's `captions` (declarative) or `questions` (interrogative). The clip is its
    `used_segment`, whose end_fid is the last frame; the truth is its `temporal_gt`, whose end_fid is
    *exclusive*. (In the official files the first never exceeds frame_count - 1, the second reaches
    frame_count.) The boxes are those of the sentence's target_id in FOLDER/VID.json anywhere below vidor
    (`trajectories`: for each native frame a list of {tid, bbox: {xmin, ymin, xmax, ymax}}); the video is
    videos/FOLDER/VID.mp4, as `video_path` in there says.

    Targets are not annotated everywhere: frames without a box are not judged, and a sentence with no box in
    its span is dropped. Returns the samples in the file's order and the report. Raises DataError.
    """
    records = _read_records(annotations, list)
    targets: dict[str, set[int]] = {}  # video -> tids that its sentences ask for
    for n, record in enumerate(records):
        _check_vidstg(f"{annotations}: record {n}", record)
        tids = {entry["target_id"] for kind in ("captions", "questions") for entry in record[kind]}
        targets.setdefault(record["vid"], set()).update(tids)
    films = _read_vidor(vidor, targets)
    report: Report = {}
    samples = []
    for n, record in enumerate(records):
        samples += _vidstg_samples(n, record, films[record["vid"]], videos, report)
    if not samples:
        why = "; ".join(f"{finding} ({len(report[finding])})" for finding in DROPS if finding in report)
        raise DataError(f"{annotations}: holds no sentence that can be used: {why or 'none at all'}")
    return samples, report


def _check_vidstg(where: str, record: dict) -> None:
    """Raise DataError for a record that breaks the format."""
    _read(where, record, "vid", TEXT)
    for key in ("width", "height", "frame_count"):
        _read(where, record, key, COUNT)
    seconds = record["frame_count"] / _read(where, record, "fps", RATE)
    _check(f"{where}: its length in seconds, frame_count / fps,", seconds, SECONDS)
    for key in ("used_segment", "temporal_gt"):
        span = _read(where, record, key, OBJECT)
        _read(f"{where}: {key}", span, "begin_fid", FRAME)
        _read(f"{where}: {key}", span, "end_fid", INTEGER)
    for key in ("captions", "questions"):
        for k, entry in enumerate(_read(where, record, key, LIST)):
            place = f"{where}: {key}[{k}]"
            _check(place, entry, OBJECT)
            _read(place, entry, "description", TEXT)
            _read(place, entry, "target_id", INTEGER)


@dataclass(frozen=True)
class VidorFilm:
    """What a VidOR file says about one video."""

    path: str  # of the video, from the folder of all videos
    width: int  # in which the boxes are measured
    height: int
    # tid -> boxes of all frames, (frames, 4) in [0, 1], NaN where there is none; and what _in_frame found
    tracks: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]]


def _vidstg_samples(n: int, record: dict, film: VidorFilm, videos: str, report: Report) -> list[Sample]:
    width, height, file_frames = (int(record[key]) for key in ("width", "height", "frame_count"))
    segment, truth = record["used_segment"], record["temporal_gt"]
    begin, stop_of_clip = segment["begin_fid"], min(segment["end_fid"] + 1, file_frames)
    first, stop = max(truth["begin_fid"], begin), min(truth["end_fid"], stop_of_clip)
    of_record = {
        CUT_SEGMENT: segment["end_fid"] >= file_frames,
        CUT: (first, stop) != (truth["begin_fid"], truth["end_fid"]),
        OTHER_SIZE: (width, height) != (film.width, film.height),
    }
    samples = []
    entries = {f"{n}/{kind}/{k}": e for kind in ("captions", "questions") for k, e in enumerate(record[kind])}
    for key, entry in entries.items():
        boxes, found = film.tracks[entry["target_id"]]
        track = Track(first - begin, boxes[first:stop])  # a view: the file's sentences share its boxes
        if first >= stop or not track:
            report.setdefault(NO_SPAN if first >= stop else NO_BOX, []).append(key)
            continue
        found = {finding: frames[first:stop].any() for finding, frames in found.items()}
        found |= {**of_record, UNBOXED: len(track) < stop - first}
        for finding in sorted(finding for finding in found if found[finding]):
            report.setdefault(finding, []).append(key)
        samples.append(
            Sample(
                id=key,
                video=os.path.join(videos, film.path),
                sentence=entry["description"],
                width=width,
                height=height,
                num_frames=stop_of_clip - begin,
                fps=float(record["fps"]),
                begin_frame=begin,
                file_frames=file_frames,
                first_frame=first - begin,
                stop_frame=stop - begin,
                boxes=track,
                question_type=QUESTION_TYPES["questions" in key],
            )
        )
    return samples


def _read_vidor(vidor: str, targets: dict[str, set[int]]) -> dict[str, VidorFilm]:
    """VidOR's files of some videos: video -> its tracks of the targets. Raises DataError."""
    paths: dict[str, str] = {}
    found = ((folder, name) for folder, _, names in os.walk(vidor, followlinks=True) for name in names)
    for folder, name in found:
        vid, extension = os.path.splitext(name)
        if extension == ".json" and vid in targets:
            path = os.path.join(folder, name)
            if paths.setdefault(vid, path) != path:
                raise DataError(f"{path}: {paths[vid]} is of the same video; keep one below {vidor}")
    if missing := [f"{vid}.json" for vid in targets if vid not in paths]:
        raise DataError(
            f"{vidor}: {len(missing)} of {len(targets)} VidOR files missing: {few(missing)}; set `vidor` to"
            " the folder of VidOR's annotations (training for VidSTG's train and val, validation for test)"
        )
    bar = tqdm(targets.items(), desc="VidOR tracks", unit="video", delay=2, leave=False, disable=None)
    return {vid: _read_vidor_file(paths[vid], vid, tids) for vid, tids in bar}


def _read_vidor_file(path: str, vid: str, tids: set[int]) -> VidorFilm:
    # Thousands of large files: looking for keys that stand twice would take minutes.
    content = _check(f"{path}: the file", read_json(path, unique=False), OBJECT)
    width, height = (int(_read(path, content, side, COUNT)) for side in ("width", "height"))
    frames = _read(path, content, "trajectories", LIST)
    tracks = {tid: np.full((len(frames), 4), np.nan) for tid in tids}
    for k, boxes in enumerate(frames):
        try:
            for entry in boxes:
                if entry["tid"] in tids:
                    corners = [entry["bbox"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
                    if not all(map(is_number, corners)):
                        raise ValueError(corners)
                    tracks[entry["tid"]][k] = corners
        except (KeyError, TypeError, ValueError):
            wanted = "a list of {tid, bbox: {xmin, ymin, xmax, ymax}} in numbers"
            raise _wrong(f"{path}: trajectories[{k}]", boxes, wanted) from None
    video = content.get("video_path", f"{os.path.basename(os.path.dirname(path))}/{vid}.mp4")
    _check(f"{path}: video_path", video, PATH)
    boxes = {tid: _in_frame(corners, width, height) for tid, corners in tracks.items()}
    return VidorFilm(video, width, height, boxes)


def _refuse_outside(place: str, boxes: list, found: dict[str, np.ndarray], width: int, height: int) -> None:
    """Raise DataError for a box outside the image: more likely the size or the unit is wrong."""
    for k in found[OUTSIDE].nonzero()[0]:
        raise _wrong(f"{place}[{k}]", boxes[k], f"inside the image of {width} x {height}")


def _in_frame(corners: np.ndarray, width: int, height: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Boxes in pixels, as annotated -> boxes in [0, 1].

    corners: (frames, 4), x1, y1, x2, y2 in any order, NaN where a frame has no box. Returns (frames, 4), NaN
    where no box is left; and finding -> (frames,), True where it was found.
    """
    x1, y1, x2, y2 = corners.T
    empty = (x1 == x2) | (y1 == y2)
    low = np.minimum(corners[:, :2], corners[:, 2:])  # (frames, 2)
    high = np.maximum(corners[:, :2], corners[:, 2:])
    size = np.array([width, height])
    outside = ((high <= 0) | (low >= size)).any(1) & ~empty
    found = {
        EMPTY: empty,
        OUTSIDE: outside,
        SORTED: ((x1 > x2) | (y1 > y2)) & ~empty,
        CLIPPED: ((low < 0) | (high > size)).any(1) & ~outside & ~empty,
    }
    boxes = np.hstack([np.maximum(low, 0) / size, np.minimum(high, size) / size])
    boxes[empty | outside] = np.nan
    return boxes, found
