"""Annotations to samples: one loader per official format, every flaw repaired or dropped is counted.

    samples, report = load_samples("vidstg", "val_annotations.json", "videos", "vidor")
    print(format_report(report))
    python data.py --check configs/vidstg.yaml          counts, findings, answer lengths, the grid's ceiling

A sample is one sentence about one clip. Its truth is the box track, frame by frame as annotated; the
annotated seconds (HC-STVG's st_time, ed_time) disagree with the track by 8-10 frames and are not read.
Sentences stay as they are. A record that is not of its format is an error.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from runtime.files import (
    REMEDY,
    DataError,
    few,
    get,
    is_number,
    positive,
    positive_integer,
    read_json,
    run_script,
    short,
)
from samples import QUESTION_TYPES, Sample, Track

HCSTVG_SECONDS = 20  # "the duration of all videos is 20 s": their only statement about the frame rate
DATASETS = ("hcstvg", "vidstg")
# Sentences in the official files (papers and repositories of the data sets).
OFFICIAL_COUNTS = {
    ("hcstvg", "train.json"): 4500,  # v1
    ("hcstvg", "test.json"): 1160,
    ("hcstvg", "train_v2.json"): 10131,
    ("hcstvg", "val_v2.json"): 2000,
    ("vidstg", "train_annotations.json"): 80684,
    ("vidstg", "val_annotations.json"): 8956,
    ("vidstg", "test_annotations.json"): 10303,
}


# What was found, and what became of it: finding -> ids of the samples concerned.
Report = dict[str, list[str]]
CLIPPED = "box partly outside the image: clipped"
SORTED = "box with a negative side: corners sorted"
EMPTY = "box without area: frame left without a box"
OUTSIDE = "box outside the image: frame left without a box"  # of VidSTG; of HC-STVG it is an error
CUT = "span leaves the clip: cut"
CUT_SEGMENT = "segment leaves the video: cut"
OTHER_SIZE = "size is not VidOR's, in which the boxes are measured"
UNBOXED = "frames of the span without a box: not judged"
NO_BOX = "no box of the target in the span: sentence dropped"
NO_SPAN = "no frame of the span in the clip: sentence dropped"
DROPS = (NO_BOX, NO_SPAN)


def format_report(report: Report, whole: bool = False) -> str:
    """The findings as a table: samples concerned, what was found and done, the first few ids; with `whole`
    those of all dropped sentences."""
    if not report:
        return "annotations: nothing to repair"
    width = max(map(len, report))
    rows = [f"{'samples':>9}  {'finding':<{width}}  ids"]
    for reason, ids in report.items():
        shown = ", ".join(ids) if whole and reason in DROPS else few(ids)
        rows.append(f"{len(ids):>9}  {reason:<{width}}  {shown}")
    return "\n".join(rows)


def count_sentences(samples: list[Sample], report: Report) -> str:
    """How many of a file's sentences are used, and of which type."""
    dropped = sum(len(report.get(reason, [])) for reason in DROPS)
    text = f"{len(samples)} sentences"
    types = [sum(sample.question_type == kind for sample in samples) for kind in QUESTION_TYPES]
    if any(types):
        text += f" ({', '.join(f'{n} {kind}' for n, kind in zip(types, QUESTION_TYPES, strict=True))})"
    return text + (f" of {len(samples) + dropped}, the others dropped" if dropped else "")


def load_samples(dataset: str, annotations: str, videos: str, vidor: str = "") -> tuple[list[Sample], Report]:
    """Read one annotation file of a data set ("hcstvg" or "vidstg").

    annotations: the JSON file. videos: the folder of the video files, which are not opened here. vidor: the
    folder of the box tracks, VidSTG only. Returns the samples in the file's order, and what was found.
    Raises DataError, also where no sentence is left.
    """
    if not annotations:
        raise DataError("no annotation file is named: set eval_annotations, and train_annotations to train")
    if dataset not in DATASETS:
        raise DataError(f"dataset: {dataset!r} is not one of {', '.join(DATASETS)}")
    if dataset == "hcstvg":
        return load_hcstvg(annotations, videos)
    if not vidor:
        raise DataError("dataset: vidstg needs `vidor`, the folder of VidOR's annotations with the boxes")
    return load_vidstg(annotations, videos, vidor)


def missing_videos(samples: list[Sample]) -> list[str]:
    """Paths of the samples' video files that do not exist."""
    return [path for path in dict.fromkeys(s.video for s in samples) if not os.path.isfile(path)]


def check_videos(samples: list[Sample]) -> None:
    """Raise DataError if a video file is missing. (Separate: scoring predictions needs no videos.)"""
    missing = missing_videos(samples)
    if missing:
        paths = len({sample.video for sample in samples})
        names = few([os.path.basename(path) for path in missing])
        raise DataError(
            f"{os.path.dirname(missing[0]) or '.'}: {len(missing)} of {paths} videos missing: {names};"
            " set `videos` to the folder that holds them, remove their records, or write on_bad_video: skip"
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

    Returns the samples in the file's order, and what was found. Raises DataError.
    """
    records = read_json(annotations)
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
        raise DataError(f"{where}: {short(record)} is not an object with bbox, st_frame, img_num, ...")
    sentence = record["English"] if "English" in record else get(where, record, "caption")
    _check_sentence(where, sentence)
    size = record  # v1: width and height stand in the record itself
    if "img_size" in record:
        if not isinstance(record["img_size"], list) or len(record["img_size"]) < 2:
            raise DataError(f"{where}: img_size {short(record['img_size'])} is not [height, width, 3]")
        size = dict(zip(("height", "width"), record["img_size"], strict=False))
    width, height = (positive_integer(where, size, name) for name in ("width", "height"))
    num_frames = positive_integer(where, record, "img_num")
    fps = positive(where, record, "fps") if "fps" in record else num_frames / HCSTVG_SECONDS
    first = positive_integer(where, record, "st_frame") - 1  # from 1-based to 0-based
    if first >= num_frames:
        raise DataError(
            f"{where}: st_frame {first + 1} lies after the end of the video (img_num {num_frames}); {REMEDY}"
        )
    bbox = get(where, record, "bbox")
    if not isinstance(bbox, list) or not bbox:
        raise DataError(f"{where}: bbox {short(bbox)} is not a list of at least one box; {REMEDY}")
    for k, numbers in enumerate(bbox):
        if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(is_number, numbers)):
            raise DataError(
                f"{where}: bbox[{k}] {short(numbers)} is not [x, y, width, height] in numbers; {REMEDY}"
            )

    findings = {CUT} if first + len(bbox) > num_frames else set()
    bbox = bbox[: num_frames - first]
    corners = np.array(bbox, dtype=np.float64)  # (frames, 4)
    corners[:, 2:] += corners[:, :2]
    boxes, found = _in_frame(corners, width, height)
    findings |= {finding for finding, frames in found.items() if frames.any()}
    if OUTSIDE in findings:  # not one of the data set's known flaws: more likely a wrong size
        k = int(found[OUTSIDE].argmax())
        raise DataError(
            f"{where}: bbox[{k}] {short(bbox[k])} lies outside the {width} x {height} video; {REMEDY}"
        )
    track = Track(first, boxes)
    if not track:
        raise DataError(f"{where}: bbox: no box has an area; {REMEDY}")
    for finding in sorted(findings):
        report.setdefault(finding, []).append(key)
    return Sample(
        id=key,
        video=os.path.join(videos, key),
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


# ----------------------------------------------------------------------------------------------------------
# VidSTG


def load_vidstg(annotations: str, videos: str, vidor: str) -> tuple[list[Sample], Report]:
    """Read VidSTG annotations, a JSON list of records, and the box tracks of their videos from VidOR's files.

    One sample is one of a record's `captions` (declarative) or `questions` (interrogative). The clip is its
    `used_segment`, whose end_fid is the last frame; the truth is its `temporal_gt`, whose end_fid is
    *exclusive*. The boxes are those of the sentence's target_id in FOLDER/VID.json anywhere below vidor
    (`trajectories`: for each native frame a list of {tid, bbox: {xmin, ymin, xmax, ymax}}), the video is
    videos/FOLDER/VID.mp4, by the `video_path` in there.

    Targets are not annotated everywhere: frames without a box are not judged, a sentence with none in its
    span is dropped. Returns the samples in the file's order, and what was found. Raises DataError.
    """
    records = read_json(annotations)
    if not isinstance(records, list):
        hint = "; an object with file names as keys is HC-STVG's format" if isinstance(records, dict) else ""
        raise DataError(f"{annotations}: is not a JSON list of records{hint}")
    if not records:
        raise DataError(f"{annotations}: holds no records; choose an annotation file that does")
    targets: dict[str, set[int]] = {}  # video -> tids that are asked for
    for n, record in enumerate(records):
        where = f"{annotations}: record {n}"
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: {short(record)} is not an object with vid, used_segment, captions, ..."
            )
        tids = {target for _, _, target in _vidstg_sentences(where, record)}
        vid = get(where, record, "vid")
        if not isinstance(vid, str) or not vid:
            raise DataError(f"{where}: vid {short(vid)} is not the name of a video; {REMEDY}")
        targets.setdefault(vid, set()).update(tids)
    vidor_videos = _read_vidor(vidor, targets)

    report: Report = {}
    samples = []
    for n, record in enumerate(records):
        samples += _vidstg_samples(annotations, n, record, vidor_videos[record["vid"]], videos, report)
    if not samples:
        why = "; ".join(f"{finding} ({len(report[finding])})" for finding in DROPS if finding in report)
        raise DataError(f"{annotations}: holds no sentence that can be used: {why or 'none at all'}")
    return samples, report


def _vidstg_sentences(where: str, record: dict) -> list[tuple[str, str, int]]:
    """(captions/0, sentence, target) for each sentence of a record."""
    sentences = []
    for kind in ("captions", "questions"):
        entries = get(where, record, kind)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{where}: {kind} {short(entries)} is not a list of objects; {REMEDY}")
        for k, entry in enumerate(entries):
            place = f"{where}: {kind}[{k}]"
            sentence, target = get(place, entry, "description"), get(place, entry, "target_id")
            _check_sentence(place, sentence)
            if not isinstance(target, int) or isinstance(target, bool):
                raise DataError(f"{place}: target_id {short(target)} is not a whole number; {REMEDY}")
            sentences.append((f"{kind}/{k}", sentence, target))
    return sentences


def _vidstg_samples(
    annotations: str, n: int, record: dict, vidor_video: "VidorVideo", videos: str, report: Report
) -> list[Sample]:
    where = f"{annotations}: record {n}"
    width, height, file_frames = (
        positive_integer(where, record, name) for name in ("width", "height", "frame_count")
    )
    fps = positive(where, record, "fps")
    # In the official files used_segment.end_fid never exceeds frame_count - 1 and temporal_gt.end_fid reaches
    # frame_count: one is the last frame, the other the one after.
    begin, last = _frames(where, record, "used_segment")
    stop_of_clip = min(last + 1, file_frames)  # used_segment.end_fid is the clip's last frame
    first, stop = _frames(where, record, "temporal_gt")  # temporal_gt.end_fid is exclusive
    of_record = {
        CUT_SEGMENT: last >= file_frames,
        CUT: first < begin or stop > stop_of_clip,
        OTHER_SIZE: (width, height) != (vidor_video.width, vidor_video.height),
    }
    first, stop = max(first, begin), min(stop, stop_of_clip)

    samples = []
    for place, sentence, target in _vidstg_sentences(where, record):
        key = f"{n}/{place}"
        findings = {finding for finding, found in of_record.items() if found}
        if first >= stop:
            report.setdefault(NO_SPAN, []).append(key)
            continue
        boxes, found = vidor_video.tracks[target]
        findings |= {finding for finding, frames in found.items() if frames[first:stop].any()}
        track = Track(first - begin, boxes[first:stop])  # a view: the file's sentences share its boxes
        if not track:
            report.setdefault(NO_BOX, []).append(key)
            continue
        if len(track) < stop - first:
            findings.add(UNBOXED)
        for finding in sorted(findings):
            report.setdefault(finding, []).append(key)
        kind = QUESTION_TYPES[place.startswith("questions")]
        samples.append(
            Sample(
                id=key,
                video=os.path.join(videos, vidor_video.path),
                sentence=sentence,
                width=width,
                height=height,
                num_frames=stop_of_clip - begin,
                fps=fps,
                begin_frame=begin,
                file_frames=file_frames,
                first_frame=first - begin,
                stop_frame=stop - begin,
                boxes=track,
                question_type=kind,
            )
        )
    return samples


@dataclass(frozen=True)
class VidorVideo:
    """What a VidOR file says of one video."""

    path: str  # of the video, from the folder of all videos
    width: int  # in which the boxes are measured
    height: int
    # tid -> boxes of all frames, (frames, 4) in [0, 1], NaN without one, and what was found in which of them
    tracks: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]]


def _read_vidor(vidor: str, targets: dict[str, set[int]]) -> dict[str, VidorVideo]:
    """VidOR's files of some videos: video -> its tracks, those that are asked for. Raises DataError."""
    paths: dict[str, str] = {}
    for folder, _, names in os.walk(vidor, followlinks=True):
        for name in names:
            vid, extension = os.path.splitext(name)
            if extension == ".json" and vid in targets:
                path = os.path.join(folder, name)
                if vid in paths:
                    raise DataError(f"{path}: {paths[vid]} is of the same video; keep one below {vidor}")
                paths[vid] = path
    missing = [f"{vid}.json" for vid in targets if vid not in paths]
    if missing:
        raise DataError(
            f"{vidor}: {len(missing)} of {len(targets)} VidOR files missing: {few(missing)}; set `vidor` to"
            " the folder of VidOR's annotations (training for VidSTG's train and val, validation for test)"
        )
    bar = tqdm(targets.items(), desc="VidOR tracks", unit="video", delay=2, leave=False)
    return {vid: _read_vidor_file(paths[vid], vid, tids) for vid, tids in bar}


def _read_vidor_file(path: str, vid: str, tids: set[int]) -> VidorVideo:
    content = read_json(path, unique=False)  # thousands of large files: the check would take minutes
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; fetch VidOR's file again")
    width, height = (positive_integer(path, content, name) for name in ("width", "height"))
    frames = get(path, content, "trajectories")
    if not isinstance(frames, list):
        raise DataError(f"{path}: trajectories is not a list with the boxes of each frame; fetch it again")
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
            raise DataError(
                f"{path}: trajectories[{k}] is not a list of"
                " {tid, bbox: {xmin, ymin, xmax, ymax}} in numbers; correct or fetch the file again"
            ) from None
    video = content.get("video_path", f"{os.path.basename(os.path.dirname(path))}/{vid}.mp4")
    parts = video.split("/") if isinstance(video, str) else [""]
    if "" in parts or ".." in parts:  # nothing outside the folder of videos
        raise DataError(f"{path}: video_path {short(video)} is not FOLDER/VID.mp4; fetch VidOR's file again")
    return VidorVideo(
        video, width, height, {tid: _in_frame(corners, width, height) for tid, corners in tracks.items()}
    )


def _frames(where: str, record: dict, name: str) -> tuple[int, int]:
    """begin_fid and end_fid of a record's used_segment or temporal_gt."""
    span = get(where, record, name)
    if not isinstance(span, dict):
        raise DataError(
            f"{where}: {name} {short(span)} is not an object with begin_fid and end_fid; {REMEDY}"
        )
    begin, end = (get(f"{where}: {name}", span, key) for key in ("begin_fid", "end_fid"))
    if not all(isinstance(fid, int) and not isinstance(fid, bool) for fid in (begin, end)) or begin < 0:
        raise DataError(f"{where}: {name} {short(span)} is not a range of frames counted from 0; {REMEDY}")
    return begin, end


# ----------------------------------------------------------------------------------------------------------
# Sentences and boxes


def _check_sentence(where: str, sentence: object) -> None:
    if not isinstance(sentence, str) or not sentence.strip():
        raise DataError(f"{where}: the sentence {short(sentence)} is not a text; {REMEDY}")
    if "<|" in sentence:
        raise DataError(
            f"{where}: the sentence {short(sentence)} holds '<|', the mark of Qwen's special tokens;"
            " remove it from the sentence"
        )


def _in_frame(corners: np.ndarray, width: int, height: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Boxes in pixels as annotated -> boxes in [0, 1].

    corners: (frames, 4), x1, y1, x2, y2 in any order, NaN where a frame has no box. Returns (frames, 4),
    NaN where none is left, and finding -> (frames,), true where it was found.
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


if __name__ == "__main__":
    from lab import check_data

    run_script(lambda: check_data.main(sys.argv[1:]), "standard output", "free some space")
