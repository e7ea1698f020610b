"""VidSTG: records and VidOR tracks written by hand, against what they mean; flaws; errors; the counts."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    CLIPPED,
    CUT,
    CUT_SEGMENT,
    EMPTY,
    NO_BOX,
    NO_SPAN,
    OFFICIAL_COUNTS,
    OTHER_SIZE,
    OUTSIDE,
    SORTED,
    UNBOXED,
    count_sentences,
    format_report,
    load_samples,
    load_vidstg,
)
from runtime.files import DataError
from samples import QUESTION_TYPES, Track


def say(description, target):
    return {"description": description, "type": "person", "target_id": target}


# Of a file of 40 frames the clip is frames 10 .. 29, the truth its frames 12, 13, 14.
RECORD = {
    "vid": "2401",
    "frame_count": 40,
    "fps": 10,
    "width": 640,
    "height": 480,
    "subject/objects": [{"tid": 0, "category": "dog"}, {"tid": 1, "category": "adult"}],
    "used_segment": {"begin_fid": 10, "end_fid": 29},
    "used_relation": {
        "subject_tid": 0,
        "object_tid": 1,
        "predicate": "chase",
        "begin_fid": 12,
        "end_fid": 15,
    },
    "temporal_gt": {"begin_fid": 12, "end_fid": 15},
    "captions": [say("a dog  chases a man with a halmet.", 0)],
    "questions": [],
}


def span(begin, end):
    return {"begin_fid": begin, "end_fid": end}


def walk(f):
    """The box of frame f: from f / 40 to (f + 1) / 40 of the width, from 1 / 10 to 1 / 2 of the height."""
    return (16 * f, 48, 16 * f + 16, 240)


def vidor(tracks, frames=40, **changes):
    """A VidOR file. tracks: tid -> {frame: box}; a key that changes to `...` is left out."""
    names = ("xmin", "ymin", "xmax", "ymax")
    film = {
        "version": "VERSION 1.0",
        "video_id": "2401",
        "video_path": "1203/2401.mp4",
        "frame_count": frames,
        "fps": 10,
        "width": 640,
        "height": 480,
        "trajectories": [
            [
                {
                    "tid": tid,
                    "bbox": dict(zip(names, boxes[f], strict=True)),
                    "generated": 1,
                    "tracker": "none",
                }
                for tid, boxes in tracks.items()
                if f in boxes
            ]
            for f in range(frames)
        ],
    }
    return changed(film, changes)


def changed(record, changes):
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


FILM = vidor({0: {f: walk(f) for f in range(40)}})


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def load(folder, records, film=FILM, films=None):
    """films: path below the folder of VidOR's annotations -> content."""
    for path, content in ({"1203/2401.json": film} if films is None else films).items():
        write(folder / "vidor" / path, content)
    return load_vidstg(write(folder / "val.json", records), "videos", str(folder / "vidor"))


def load_one(folder, film=FILM, **changes):
    """RECORD with some values changed."""
    (sample,), report = load(folder, [changed(RECORD, changes)], film)
    return sample, report


# ----------------------------------------------------------------------------------------------------------
# What records mean


def test_one_record(tmp_path):
    sample, report = load_one(tmp_path)
    assert sample.id == "0/captions/0"
    assert sample.video == "videos/1203/2401.mp4"
    assert sample.sentence == "a dog  chases a man with a halmet."  # nothing is repaired
    assert sample.question_type == "declarative"
    assert (sample.width, sample.height, sample.fps, sample.file_frames) == (640, 480, 10.0, 40)
    assert (sample.begin_frame, sample.num_frames) == (10, 20)  # 10 .. 29, the last one is in it
    assert (sample.first_frame, sample.stop_frame) == (2, 5)  # 12, 13, 14, from frame 10 on
    assert sample.boxes == {  # 12 x 16 / 640 = 0.3, 13 x 16 / 640 = 0.325, 48 / 480 = 0.1, 240 / 480 = 0.5
        2: (0.3, 0.1, 0.325, 0.5),
        3: (0.325, 0.1, 0.35, 0.5),
        4: (0.35, 0.1, 0.375, 0.5),
    }
    assert report == {}
    assert all(type(value) is float for box in sample.boxes.values() for value in box)
    assert all(
        type(n) is int for n in (*sample.boxes, sample.num_frames, sample.first_frame, sample.stop_frame)
    )


def test_sentences_of_several_records_in_the_order_of_the_file(tmp_path):
    """No, one and two questions; each sentence has its own target, and its place in the file as its id."""
    here, there = (0, 0, 320, 480), (320, 0, 640, 480)
    film = vidor({0: dict.fromkeys(range(40), here), 7: dict.fromkeys(range(40), there)})
    records = [
        {**RECORD, "questions": [say("who is chased?", 7), say("what chases the man?", 0)]},
        RECORD,
        {**RECORD, "captions": [say("a man runs.", 7)], "questions": [say("who runs?", 7)]},
    ]
    samples, report = load(tmp_path, records, film)
    rows = [(s.id, s.question_type, s.sentence, s.boxes[2][0]) for s in samples]
    assert rows == [
        ("0/captions/0", "declarative", "a dog  chases a man with a halmet.", 0.0),
        ("0/questions/0", "interrogative", "who is chased?", 0.5),
        ("0/questions/1", "interrogative", "what chases the man?", 0.0),
        ("1/captions/0", "declarative", "a dog  chases a man with a halmet.", 0.0),
        ("2/captions/0", "declarative", "a man runs.", 0.5),
        ("2/questions/0", "interrogative", "who runs?", 0.5),
    ]
    assert report == {}
    assert {s.question_type for s in samples} == set(QUESTION_TYPES)
    assert count_sentences(samples, report) == "6 sentences (3 declarative, 3 interrogative)"


def test_load_samples(tmp_path):
    expected = load(tmp_path, [RECORD])
    paths = str(tmp_path / "val.json"), "videos", str(tmp_path / "vidor")
    assert load_samples("vidstg", *paths) == expected == load_vidstg(*paths)


def test_sentences_stay_as_they_are_and_duplicates_count(tmp_path):
    texts = ["The  MAN who wears a halmet .", " what is    beneath?", "l'été, 他转身"]
    record = {**RECORD, "questions": [say(text, 0) for text in (*texts, texts[0])]}
    samples, report = load(tmp_path, [record, record])
    assert [s.sentence for s in samples] == 2 * [RECORD["captions"][0]["description"], *texts, texts[0]]
    assert len({s.id for s in samples}) == 10 and report == {}


@pytest.mark.parametrize(
    ("fps", "expected"), [(30, 30.0), (23.976, 23.976), (29.97002997002997, 30000 / 1001)]
)
def test_frame_rates(tmp_path, fps, expected):
    sample, _ = load_one(tmp_path, fps=fps)
    assert sample.fps == expected and type(sample.fps) is float


def test_truth_that_ends_with_the_file(tmp_path):
    """temporal_gt may end at frame_count, which is one past the last frame: frames 38 and 39 of 40."""
    sample, report = load_one(tmp_path, used_segment=span(10, 39), temporal_gt=span(38, 40))
    assert (sample.num_frames, sample.first_frame, sample.stop_frame) == (30, 28, 30)
    assert [round(box[0] * 40) for box in sample.boxes.values()] == [38, 39]
    assert list(sample.boxes) == [28, 29] and report == {}


def test_neighbours_share_a_frame(tmp_path):
    """Frame 479 is the last one of the first segment and the first one of the second."""
    film = vidor({0: {479: (0, 0, 64, 48), 480: (64, 48, 128, 96)}}, frames=1805)
    record = {**RECORD, "frame_count": 1805}
    first = {**record, "used_segment": span(0, 479), "temporal_gt": span(479, 480)}
    second = {**record, "used_segment": span(479, 1804), "temporal_gt": span(479, 481)}
    (a, b), report = load(tmp_path, [first, second], film)
    assert (a.begin_frame, a.num_frames, a.first_frame, a.stop_frame) == (0, 480, 479, 480)
    assert (b.begin_frame, b.num_frames, b.first_frame, b.stop_frame) == (479, 1326, 0, 2)
    assert a.boxes == {479: (0.0, 0.0, 0.1, 0.1)}
    assert b.boxes == {0: (0.0, 0.0, 0.1, 0.1), 1: (0.1, 0.1, 0.2, 0.2)}
    assert report == {}


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((640, 1138), (0, 569, 320, 1138), (0.0, 0.5, 0.5, 1.0)),  # portrait: nothing is clipped at 640
        ((639, 361), (213, 0, 639, 361), (1 / 3, 0.0, 1.0, 1.0)),
        ((1, 1), (0, 0, 1, 1), (0.0, 0.0, 1.0, 1.0)),
        ((640, 480), (63.5, 48.25, 128.0, 96), (63.5 / 640, 48.25 / 480, 0.2, 0.2)),
    ],
)
def test_sizes(tmp_path, size, box, expected):
    width, height = size
    film = vidor({0: dict.fromkeys(range(40), box)}, width=width, height=height)
    sample, report = load_one(tmp_path, film, width=width, height=height)
    assert (sample.width, sample.height, report) == (width, height, {})
    assert sample.boxes[2] == pytest.approx(expected, abs=1e-15)


# ----------------------------------------------------------------------------------------------------------
# The truth in steps. The clip is frames 37 .. 136 of the file: 100 frames at 29.97 fps, 3.34 s. Steps of half
# a second begin every 14.985 frames, at 0, 14.985, 29.97, 44.955, 59.94, 74.925, 89.91: they show frames
# 0, 14, 29, 44, 59, 74, 89 of the clip, which are 37, 51, 66, 81, 96, 111, 126 of the file.


def load_137(tmp_path, begin, end, boxes=range(200)):
    """Their boxes tell the frame of the file: x1 = f / 200 of the width."""
    film = vidor({0: {f: (f, 0, f + 10, 10) for f in boxes}}, frames=200, width=200)
    changes = {"frame_count": 200, "fps": 29.97, "width": 200, "used_segment": span(37, 136)}
    return load_one(tmp_path, film, temporal_gt=span(begin, end), **changes)[0]


@pytest.mark.parametrize(
    ("begin", "end", "frames"),
    [
        (66, 112, {2: 66, 3: 81, 4: 96, 5: 111}),
        (66, 111, {2: 66, 3: 81, 4: 96}),  # the end is exclusive: 111 is out
        (67, 112, {3: 81, 4: 96, 5: 111}),
        (37, 137, {0: 37, 1: 51, 2: 66, 3: 81, 4: 96, 5: 111, 6: 126}),
        (127, 137, {6: 127}),  # within the last step: its nearest box
        (82, 96, {3: 82}),  # frames 45 .. 58 of the clip show nothing; they begin at 1.50 s, in step 3
    ],
)
def test_truth_in_steps(tmp_path, begin, end, frames):
    sample = load_137(tmp_path, begin, end)
    assert sample.grid(0.5).num_steps == 7
    truth = sample.truth(0.5)
    assert truth.span == (min(frames), max(frames))
    assert {step: round(box[0] * 200) for step, box in truth.boxes.items()} == frames


def test_truth_in_seconds(tmp_path):
    """Seconds 0 .. 3 show frames 0, 29, 59, 89 of the clip, 37, 66, 96, 126 of the file."""
    sample = load_137(tmp_path, 66, 112)
    truth = sample.truth(1.0)
    assert sample.grid(1.0).num_steps == 4 and truth.span == (1, 2)
    assert {step: round(box[0] * 200) for step, box in truth.boxes.items()} == {1: 66, 2: 96}


@pytest.mark.parametrize(
    ("boxes", "frames"),
    [
        ((66, 67, 111), {2: 66, 5: 111}),  # steps 3 and 4 have none
        ((70, 80, 97), {2: 70}),  # none on a sampled frame: the nearest to frame 66 stands in
        ((65, 81, 112), {3: 81}),  # 65 and 112 are outside the truth
    ],
)
def test_truth_in_steps_without_some_boxes(tmp_path, boxes, frames):
    truth = load_137(tmp_path, 66, 112, boxes).truth(0.5)
    assert truth.span == (2, 5)  # boxes do not move it
    assert {step: round(box[0] * 200) for step, box in truth.boxes.items()} == frames


# ----------------------------------------------------------------------------------------------------------
# Flaws: repaired, left out or dropped, and counted

KEPT = say("this one has its boxes", 9)  # beside a sentence that is dropped


def load_beside(folder, target, frames=40):
    """The caption's target has the boxes `target`, frame -> box; a question's has all of them."""
    film = vidor({0: target, 9: dict.fromkeys(range(12, 15), (0, 0, 64, 48))}, frames)
    return load(folder, [{**RECORD, "questions": [KEPT]}], film)


def test_frames_without_a_box_are_not_judged(tmp_path):
    (sample, whole), report = load_beside(tmp_path, {11: walk(11), 12: walk(12), 14: walk(14)})
    assert (sample.first_frame, sample.stop_frame) == (2, 5)  # the span stays
    assert list(sample.boxes) == [2, 4] and len(sample.boxes) == 2 and 3 not in sample.boxes
    assert sample.boxes[4] == (0.35, 0.1, 0.375, 0.5)
    assert len(whole.boxes) == 3
    assert report == {UNBOXED: ["0/captions/0"]}


@pytest.mark.parametrize("target", [{}, {11: walk(11), 15: walk(15)}])
def test_target_without_boxes_in_the_span_is_dropped(tmp_path, target):
    """In no frame of the file, or only one frame before and one after the span."""
    samples, report = load_beside(tmp_path, target)
    assert [s.id for s in samples] == ["0/questions/0"]
    assert report == {NO_BOX: ["0/captions/0"]}
    assert count_sentences(samples, report) == (
        "1 sentences (0 declarative, 1 interrogative) of 2, the others dropped"
    )


@pytest.mark.parametrize("frames", [14, 13, 12, 5, 0])
def test_vidor_file_that_ends_within_or_before_the_span(tmp_path, frames):
    """The span is 12, 13, 14. With 14 frames the file has 12 and 13; with 12 or fewer none."""
    film = vidor({0: {f: walk(f) for f in range(40)}}, frames)
    records = [RECORD, {**RECORD, "used_segment": span(0, 29), "temporal_gt": span(0, 1)}]
    if frames > 12:
        (sample, _), report = load(tmp_path, records, film)
        assert list(sample.boxes) == list(range(2, frames - 10)) and sample.stop_frame == 5
        assert report == {UNBOXED: ["0/captions/0"]}
    elif frames:
        samples, report = load(tmp_path, records, film)
        assert [s.id for s in samples] == ["1/captions/0"] and report == {NO_BOX: ["0/captions/0"]}
    else:
        with pytest.raises(DataError, match=r"val\.json: holds no sentence that can be used: no box"):
            load(tmp_path, records, film)


@pytest.mark.parametrize(
    ("box", "expected", "reasons"),
    [
        ((-64, 48, 64, 96), (0.0, 0.1, 0.1, 0.2), [CLIPPED]),
        ((64, -48, 128, 48), (0.1, 0.0, 0.2, 0.1), [CLIPPED]),
        ((576, 432, 704, 528), (0.9, 0.9, 1.0, 1.0), [CLIPPED]),
        ((-1, -1, 641, 481), (0.0, 0.0, 1.0, 1.0), [CLIPPED]),
        ((0, 0, 640, 480), (0.0, 0.0, 1.0, 1.0), []),
        ((128, 48, 64, 96), (0.1, 0.1, 0.2, 0.2), [SORTED]),
        ((64, 96, 128, 48), (0.1, 0.1, 0.2, 0.2), [SORTED]),
        ((64, 96, -64, 48), (0.0, 0.1, 0.1, 0.2), [CLIPPED, SORTED]),
        ((64, 48, 64, 96), None, [EMPTY, UNBOXED]),  # no width
        ((64, 48, 128, 48), None, [EMPTY, UNBOXED]),  # no height
        ((-9, -9, -9, -9), None, [EMPTY, UNBOXED]),
        ((640, 0, 704, 48), None, [OUTSIDE, UNBOXED]),  # it begins where the image ends
        ((-64, 0, 0, 48), None, [OUTSIDE, UNBOXED]),
        ((0, 480, 64, 500), None, [OUTSIDE, UNBOXED]),
        ((0, -20, 64, -10), None, [OUTSIDE, UNBOXED]),
    ],
)
def test_boxes_that_are_repaired_or_left_out(tmp_path, box, expected, reasons):
    film = vidor({0: {12: (0, 0, 640, 480), 13: box, 14: box}})
    sample, report = load_one(tmp_path, film)
    assert report == {reason: ["0/captions/0"] for reason in reasons}  # counted once, however many the boxes
    assert (sample.first_frame, sample.stop_frame) == (2, 5)
    if expected is None:
        assert sample.boxes == {2: (0.0, 0.0, 1.0, 1.0)}
    else:
        assert sample.boxes[3] == pytest.approx(expected, abs=1e-15) and sample.boxes[3] == sample.boxes[4]


def test_flaws_outside_the_span_or_of_another_target_do_not_matter(tmp_path):
    bad = {11: (900, 0, 910, 9), 15: (5, 5, 5, 5)}
    film = vidor({0: {**{f: walk(f) for f in (12, 13, 14)}, **bad}, 1: {13: (-9, 9, -10, 700)}})
    sample, report = load_one(tmp_path, film)
    assert len(sample.boxes) == 3 and report == {}


@pytest.mark.parametrize("box", [(700, 0, 710, 9), (5, 5, 5, 9)])
def test_sentence_whose_boxes_are_all_left_out_is_dropped(tmp_path, box):
    samples, report = load_beside(tmp_path, dict.fromkeys(range(12, 15), box))
    assert [s.id for s in samples] == ["0/questions/0"] and report == {NO_BOX: ["0/captions/0"]}


@pytest.mark.parametrize(
    ("truth", "frames"),
    [
        ((5, 13), (0, 3)),  # 10, 11, 12 are in the clip
        ((28, 33), (18, 20)),  # 28, 29
        ((5, 35), (0, 20)),
        ((29, 31), (19, 20)),
        ((9, 11), (0, 1)),
    ],
)
def test_span_that_leaves_the_clip_is_cut(tmp_path, truth, frames):
    sample, report = load_one(tmp_path, temporal_gt=span(*truth))
    assert (sample.first_frame, sample.stop_frame) == frames
    assert list(sample.boxes) == list(range(*frames))
    assert round(sample.boxes[frames[0]][0] * 40) == frames[0] + 10  # still the boxes of those frames
    assert report == {CUT: ["0/captions/0"]}


def test_span_that_leaves_the_file_is_cut(tmp_path):
    sample, report = load_one(tmp_path, used_segment=span(10, 39), temporal_gt=span(38, 42))
    assert (sample.num_frames, sample.first_frame, sample.stop_frame) == (30, 28, 30)
    assert report == {CUT: ["0/captions/0"]}


@pytest.mark.parametrize("truth", [(10, 11), (10, 30), (29, 30)])
def test_span_that_just_fits_is_not_cut(tmp_path, truth):
    sample, report = load_one(tmp_path, temporal_gt=span(*truth))
    assert (sample.first_frame, sample.stop_frame) == (truth[0] - 10, truth[1] - 10) and report == {}


@pytest.mark.parametrize("truth", [(2, 10), (9, 10), (30, 31), (35, 50), (90, 95)])
def test_span_outside_the_clip_is_dropped(tmp_path, truth):
    """The clip is 10 .. 29. Both sentences go; those of the other record stay."""
    record = {**RECORD, "questions": [say("what?", 0)], "temporal_gt": span(*truth)}
    samples, report = load(tmp_path, [record, RECORD])
    assert [s.id for s in samples] == ["1/captions/0"]
    assert report == {NO_SPAN: ["0/captions/0", "0/questions/0"]}
    assert "1 declarative, 0 interrogative) of 3, the others dropped" in count_sentences(samples, report)


@pytest.mark.parametrize(
    ("segment", "truth"),
    [((10, 29), (15, 12)), ((10, 29), (12, 12)), ((29, 10), (12, 15)), ((40, 45), (41, 43))],
)
def test_spans_without_frames_are_dropped(tmp_path, segment, truth):
    record = {**RECORD, "used_segment": span(*segment), "temporal_gt": span(*truth)}
    samples, report = load(tmp_path, [record, RECORD])
    assert [s.id for s in samples] == ["1/captions/0"] and report == {NO_SPAN: ["0/captions/0"]}


def test_segment_that_leaves_the_file_is_cut(tmp_path):
    """The file has the frames 0 .. 39."""
    sample, report = load_one(tmp_path, used_segment=span(10, 40))
    assert (sample.begin_frame, sample.num_frames, report) == (10, 30, {CUT_SEGMENT: ["0/captions/0"]})


def test_boxes_are_measured_in_vidors_size(tmp_path):
    """A record that says 320 x 240 of a video of 640 x 480: the boxes stay where they are."""
    sample, report = load_one(tmp_path, width=320, height=240)
    assert (sample.width, sample.height, report) == (320, 240, {OTHER_SIZE: ["0/captions/0"]})
    assert sample.boxes == load_one(tmp_path)[0].boxes


def test_report_is_a_table(tmp_path):
    """Five sentences that are clipped, two of another target that are dropped, one that is cut as well."""
    clipped = {**RECORD, "questions": [say("who?", 1)] * 2}
    film = vidor({0: dict.fromkeys(range(40), (-5, 0, 64, 48))})
    samples, report = load(
        tmp_path, [clipped, RECORD, RECORD, RECORD, {**RECORD, "temporal_gt": span(9, 12)}], film
    )
    assert report == {
        CLIPPED: [f"{n}/captions/0" for n in range(5)],
        NO_BOX: ["0/questions/0", "0/questions/1"],
        CUT: ["4/captions/0"],
    }
    rows = {row.split()[0]: row.split() for row in format_report(report).splitlines()}
    assert rows["samples"] == ["samples", "finding", "ids"]
    assert rows["5"] == ["5", *CLIPPED.split(), "0/captions/0,", "1/captions/0,", "2/captions/0,", "..."]
    assert rows["2"] == ["2", *NO_BOX.split(), "0/questions/0,", "0/questions/1"]
    assert rows["1"] == ["1", *CUT.split(), "4/captions/0"]
    assert count_sentences(samples, report).startswith("5 sentences (5 declarative, 0 interrogative) of 7, ")


# ----------------------------------------------------------------------------------------------------------
# VidOR's files


@pytest.mark.parametrize("path", ["1203/2401.json", "training/1203/2401.json", "a/validation/77/2401.json"])
def test_folders_of_vidor(tmp_path, path):
    """Files of other videos, and other files, lie beside it and are not opened. The folder's name is free."""
    films = {path: FILM, "training/1203/12401.json": "broken", "training/9/2401.txt": "broken"}
    samples, report = load(tmp_path, [RECORD], films={**films, "2401/24010.json": "", "2401.json.zip": ""})
    assert samples[0].video == "videos/1203/2401.mp4" and len(samples[0].boxes) == 3 and report == {}


def test_video_path_of_another_kind(tmp_path):
    sample, _ = load_one(tmp_path, vidor({0: {12: walk(12)}}, video_path="a/b/other.mkv"))
    assert sample.video == "videos/a/b/other.mkv"
    sample, _ = load_one(tmp_path, vidor({0: {12: walk(12)}}, video_path=...))
    assert sample.video == "videos/1203/2401.mp4"  # as the VidOR file lies: FOLDER/VID


def test_linked_folders(tmp_path):
    """Large data often lies elsewhere: vidor/training is a link to it."""
    write(tmp_path / "disk" / "1203" / "2401.json", FILM)
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "training").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert len(load(tmp_path, [RECORD], films={})[0]) == 1


def test_several_videos(tmp_path):
    """Each has its own file, tids and size: target 0 is another one in each video."""
    films = {
        "1/a.json": vidor({0: {12: (0, 0, 64, 48)}}, video_path="1/a.mp4"),
        "2/b.json": vidor({0: {12: (0, 0, 64, 48)}}, video_path="2/b.mp4", width=128, height=96),
    }
    records = [{**RECORD, "vid": vid, "temporal_gt": span(12, 13)} for vid in "bab"]
    samples, _ = load(tmp_path, records, films=films)
    assert [s.video for s in samples] == ["videos/2/b.mp4", "videos/1/a.mp4", "videos/2/b.mp4"]
    assert [s.boxes[2] for s in samples] == [(0, 0, 0.5, 0.5), (0, 0, 0.1, 0.1), (0, 0, 0.5, 0.5)]


def test_the_same_video_twice(tmp_path):
    films = {"training/1203/2401.json": FILM, "validation/1203/2401.json": FILM}
    with pytest.raises(DataError, match=r"is of the same video; keep one below") as caught:
        load(tmp_path, [RECORD], films=films)
    assert all(str(tmp_path / "vidor" / path) in str(caught.value) for path in films)
    write(tmp_path / "vidor" / "training" / "1203" / "9.json", "")  # of a video that nobody asks for
    write(tmp_path / "vidor" / "validation" / "1203" / "9.json", "")
    os.remove(tmp_path / "vidor" / "training" / "1203" / "2401.json")
    assert len(load(tmp_path, [RECORD], films={})[0]) == 1


def test_missing_files_are_counted_and_named(tmp_path):
    records = [{**RECORD, "vid": vid} for vid in ("2401", "b", "b", "c", "d", "e")]
    with pytest.raises(
        DataError, match=r"4 of 5 VidOR files missing: b\.json, c\.json, d\.json, \.\.\.; set"
    ):
        load(tmp_path, records)
    with pytest.raises(DataError, match=r"1 of 2 VidOR files missing: b\.json; set `vidor` to the") as caught:
        load(tmp_path, records[:3])
    assert str(caught.value).startswith(f"{tmp_path / 'vidor'}: ")
    with pytest.raises(DataError, match=r"nowhere: 1 of 1 VidOR files missing: 2401\.json"):
        load_vidstg(write(tmp_path / "val.json", [RECORD]), "videos", str(tmp_path / "nowhere"))


def bad_box(**changes):
    box = changed(dict(zip(("xmin", "ymin", "xmax", "ymax"), walk(12), strict=True)), changes)
    return bad_frame([{"tid": 0, "bbox": box}])


def bad_frame(frame):
    return {"trajectories": [*FILM["trajectories"][:12], frame, *FILM["trajectories"][13:]]}


FRAME = r"trajectories\[12\] is not a list of \{tid, bbox: \{xmin, ymin, xmax, ymax\}\} in numbers"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": ...}, "has no 'width'; its keys are version"),
        ({"height": ...}, "has no 'height'"),
        ({"width": 0}, "width 0 is not an integer of at least 1"),
        ({"width": "640"}, 'width "640" is not'),
        ({"height": None}, "height null is not"),
        ({"trajectories": ...}, "has no 'trajectories'"),
        ({"trajectories": None}, "trajectories is not a list"),
        ({"trajectories": {"0": []}}, "trajectories is not a list"),
        (bad_frame(None), FRAME),
        (bad_frame(3), FRAME),
        (bad_frame([3]), FRAME),
        (bad_frame(["tid"]), FRAME),
        (bad_frame([[0, 1, 2, 3]]), FRAME),
        (bad_frame({"0": [1, 2, 3, 4]}), FRAME),
        (bad_frame([{"bbox": {}}]), FRAME),
        (bad_frame([{"tid": 0}]), FRAME),
        (bad_frame([{"tid": [0], "bbox": {}}]), FRAME),
        (bad_frame([{"tid": 0, "bbox": [1, 2, 3, 4]}]), FRAME),
        (bad_frame([{"tid": 0, "bbox": None}]), FRAME),
        *((bad_box(**{name: ...}), FRAME) for name in ("xmin", "ymin", "xmax", "ymax")),
        *(
            (bad_box(ymin=value), FRAME)
            for value in (None, "9", True, [9], float("nan"), float("inf"), 10**400)
        ),
        ({"video_path": None}, "video_path null is not"),
        ({"video_path": 5}, "video_path 5 is not"),
        ({"video_path": "/etc/passwd"}, 'video_path "/etc/passwd" is not'),
        ({"video_path": "../a.mp4"}, 'video_path "../a.mp4" is not'),
        ({"video_path": ""}, 'video_path "" is not'),
    ],
)
def test_broken_vidor_files(tmp_path, changes, said):
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, [RECORD], changed(FILM, changes))
    assert str(caught.value).startswith(f"{tmp_path / 'vidor' / '1203' / '2401.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not a JSON file: .* line 1 column 1"),
        ('{"width": 640,\n "height"', "is not a JSON file: .* line 2 column"),
        ("[" * 100_000, "is not a JSON file"),
        ("[]", "is not a JSON object"),
        ("null", "is not a JSON object"),
    ],
)
def test_vidor_files_that_are_no_json_objects(tmp_path, content, said):
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, [RECORD], content)
    assert str(caught.value).startswith(f"{tmp_path / 'vidor' / '1203' / '2401.json'}: ")


# ----------------------------------------------------------------------------------------------------------
# Errors: file, record and value are named

REQUIRED = RECORD.keys() - {"subject/objects", "used_relation"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({name: ...}, f"has no '{name}'; its keys are ") for name in sorted(REQUIRED)),
        ({"frame_count": 0}, "frame_count 0 is not an integer of at least 1"),
        ({"frame_count": 9.5}, "frame_count 9.5 is not"),
        ({"frame_count": "40"}, 'frame_count "40" is not'),
        ({"frame_count": True}, "frame_count true is not"),
        ({"fps": 0}, "fps 0 is not a number above 0"),
        ({"fps": -25}, "fps -25 is not"),
        ({"fps": "25"}, 'fps "25" is not'),
        ({"fps": None}, "fps null is not"),
        ({"fps": float("nan")}, "fps NaN is not"),
        ({"width": 0}, "width 0 is not"),
        ({"width": [640]}, r"width \[640\] is not"),
        ({"height": None}, "height null is not"),
        ({"used_segment": None}, "used_segment null is not an object with begin_fid and end_fid"),
        ({"used_segment": [10, 29]}, r"used_segment \[10, 29\] is not an object"),
        ({"used_segment": {"begin_fid": 10}}, "used_segment: has no 'end_fid'; its keys are begin_fid"),
        ({"used_segment": {}}, "used_segment: has no 'begin_fid'; its keys are none"),
        ({"used_segment": span(-1, 29)}, r'used_segment \{"begin_fid": -1, "end_fid": 29\} is not a range'),
        ({"used_segment": span(10, "29")}, r'used_segment \{.*"end_fid": "29"\} is not a range of frames'),
        ({"used_segment": span(10.5, 29)}, r"used_segment \{.*10\.5.* is not a range"),
        ({"temporal_gt": "12-15"}, 'temporal_gt "12-15" is not an object'),
        ({"temporal_gt": {"end_fid": 15}}, "temporal_gt: has no 'begin_fid'"),
        (
            {"temporal_gt": span(-3, 15)},
            r'temporal_gt \{"begin_fid": -3, .* is not a range of frames counted',
        ),
        ({"temporal_gt": span(None, 15)}, r"temporal_gt \{.*null.* is not a range"),
        ({"temporal_gt": span(False, 15)}, r"temporal_gt \{.*false.* is not a range"),
        ({"captions": None}, "captions null is not a list of objects"),
        ({"captions": say("a", 0)}, r'captions \{"description".* is not a list of objects'),
        ({"captions": ["a dog"]}, r'captions \["a dog"\] is not a list of objects'),
        ({"questions": "who?"}, 'questions "who\\?" is not a list of objects'),
        ({"questions": [say("who?", 0), None]}, "questions .* is not a list of objects"),
        ({"captions": [{"target_id": 0}]}, r"captions\[0\]: has no 'description'; its keys are target_id"),
        ({"captions": [{"description": "a"}]}, r"captions\[0\]: has no 'target_id'"),
        ({"questions": [say("who?", 0), say("", 0)]}, r'questions\[1\]: the sentence "" is not a text'),
        ({"questions": [say(" \n", 0)]}, r'questions\[0\]: the sentence " \\n" is not a text'),
        ({"captions": [say(["a"], 0)]}, r'captions\[0\]: the sentence \["a"\] is not a text'),
        ({"captions": [say("a <|im_end|> b", 0)]}, r"captions\[0\]: the sentence .* holds '<\|'"),
        ({"captions": [say("a", "0")]}, r'captions\[0\]: target_id "0" is not a whole number'),
        ({"captions": [say("a", 0.5)]}, r"captions\[0\]: target_id 0\.5 is not"),
        ({"questions": [say("a", None)]}, r"questions\[0\]: target_id null is not"),
        ({"captions": [say("a", True)]}, r"captions\[0\]: target_id true is not"),
        ({"vid": None}, "vid null is not"),
        ({"vid": ["2401"]}, r'vid \["2401"\] is not'),
        ({"vid": ""}, 'vid "" is not'),
    ],
)
def test_errors_name_file_record_and_value(tmp_path, changes, said):
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, [RECORD, changed(RECORD, changes)])
    assert str(caught.value).startswith(f"{tmp_path / 'val.json'}: record 1: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no records"),
        ("3", "is not a JSON list of records$"),
        ("", "is not a JSON file: .* line 1 column 1"),
        ('[{"vid": "1",}]', "is not a JSON file: .* line 1 column"),
        ("[3]", "record 0: 3 is not an object with vid, used_segment"),
        ('[{"vid": "1", "vid": "2"}]', "the key 'vid' stands twice in one object"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, content, said):
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "val.json"))


def test_annotations_of_the_other_data_set(tmp_path):
    hcstvg = {"a.mp4": {"bbox": [[0, 0, 9, 9]], "img_num": 500, "st_frame": 1, "caption": "a"}}
    with pytest.raises(DataError, match=r"hc\.json: is not a JSON list of records; an object .* HC-STVG's"):
        load_samples("vidstg", write(tmp_path / "hc.json", hcstvg), "videos", str(tmp_path))
    with pytest.raises(DataError, match=r"vid\.json: is not a JSON object .*; a list of records is VidSTG's"):
        load_samples("hcstvg", write(tmp_path / "vid.json", [RECORD]), "videos")


# ----------------------------------------------------------------------------------------------------------
# The official composition, and memory


@pytest.mark.parametrize(
    ("name", "records", "videos", "questions", "sentences"),
    [
        ("val_annotations.json", 3996, 602, 4960, 8956),
        ("test_annotations.json", 4610, 732, 5693, 10303),
    ],
)
def test_official_counts(tmp_path, name, records, videos, questions, sentences):
    """One caption in each record; 500 records without a question, most with one, the others with two."""
    twos = questions - (records - 500)  # each of the others has one, these one more
    asked = [0] * 500 + [2] * twos + [1] * (records - 500 - twos)
    assert sum(asked) == questions and records + questions == sentences
    film = vidor({tid: dict.fromkeys(range(4), (0, 0, 9, 9)) for tid in (0, 1)}, 4)
    for v in range(videos):
        path = f"{v % 40:04}/{v}"
        write(tmp_path / "vidor" / f"{path}.json", {**film, "video_path": f"{path}.mp4"})
    content = [
        {
            **RECORD,
            "vid": str(n % videos),
            "frame_count": 4,
            "used_segment": span(n % 2, 3),
            "temporal_gt": span(1, 3 + n % 2),
            "questions": [say("who?", k % 2) for k in range(count)],
        }
        for n, count in enumerate(asked)
    ]
    samples, report = load_vidstg(write(tmp_path / name, content), "videos", str(tmp_path / "vidor"))
    assert report == {} and len(samples) == sentences == OFFICIAL_COUNTS["vidstg", name]
    assert count_sentences(samples, report) == (
        f"{sentences} sentences ({records} declarative, {questions} interrogative)"
    )
    assert len({s.id for s in samples}) == sentences and len({s.video for s in samples}) == videos
    assert {s.id.split("/")[0] for s in samples} == set(map(str, range(records)))


def test_sentences_share_their_boxes(tmp_path):
    """Of one record and of two, where video and target are the same; train has 80,684 sentences."""
    other = {**RECORD, "used_segment": span(0, 39), "temporal_gt": span(0, 30)}
    samples, _ = load(tmp_path, [{**RECORD, "questions": [say("what?", 0)]}, other])
    for sample in samples[1:]:
        assert np.shares_memory(samples[0].boxes.array, sample.boxes.array)


# ----------------------------------------------------------------------------------------------------------
# Track is a dict

UNIT = st.floats(0, 1)
TRACKS = st.tuples(st.integers(0, 50), st.lists(st.none() | st.tuples(UNIT, UNIT, UNIT, UNIT), max_size=12))


def make_track(first, boxes):
    array = np.full((len(boxes), 4), np.nan)
    for k, box in enumerate(boxes):
        if box is not None:
            array[k] = box
    plain = {first + k: box for k, box in enumerate(boxes) if box is not None}
    return Track(first, array), plain


@given(TRACKS, TRACKS)
def test_track_behaves_as_a_dict(a, b):
    track, plain = make_track(*a)
    assert len(track) == len(plain) and bool(track) == bool(plain)
    assert list(track) == list(plain) and all(type(frame) is int for frame in track)
    assert list(track.items()) == list(plain.items()) and list(track.values()) == list(plain.values())
    for frame in range(-3, 70):
        assert (frame in track) == (frame in plain)
        assert track.get(frame) == plain.get(frame) and track.get(frame, 5) == plain.get(frame, 5)
        if frame in plain:
            assert track[frame] == plain[frame] and type(track[frame]) is tuple
            assert all(type(value) is float for value in track[frame])
        else:
            with pytest.raises(KeyError):
                track[frame]
    assert track == plain and plain == track and dict(track) == plain
    other, other_plain = make_track(*b)
    assert (track == other) == (plain == other_plain) == (track == other_plain) == (other_plain == track)
    assert track == make_track(*a)[0]
    if plain:
        last = max(plain)
        assert track != {**plain, last: (2.0, 0.0, 0.0, 0.0)} and track != {**plain, last + 1: plain[last]}
        del plain[last]
        assert track != plain and plain != track


@pytest.mark.parametrize("key", [5.5, "5", None])
def test_keys_that_are_no_frames(key):
    track, _ = make_track(5, [(0.0, 0.0, 1.0, 1.0)] * 3)
    assert key not in track and track.get(key) is None


# ----------------------------------------------------------------------------------------------------------
# Random files, against a slow reading in sets of frames and of pixels

W, H = 6, 5
COORDINATE = st.integers(-3, 9)
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE) | st.just((1, 1, 4, 3))
SOME_FRAMES = st.dictionaries(st.integers(0, 9), BOX, max_size=10)
FILMS = st.builds(vidor, st.fixed_dictionaries({0: SOME_FRAMES, 1: SOME_FRAMES}), st.integers(0, 10))
SENTENCES = st.lists(st.builds(say, st.sampled_from(["a", "b  b"]), st.integers(0, 2)), max_size=2)


@st.composite
def random_records(draw):
    count = draw(st.integers(1, 10))
    begin = draw(st.integers(0, count - 1))
    first = draw(st.integers(0, 10))
    return {
        **RECORD,
        "vid": draw(st.sampled_from("pq")),
        "width": W,
        "height": H,
        "frame_count": count,
        "fps": draw(st.sampled_from([10, 29.97])),
        "used_segment": span(begin, draw(st.integers(begin, count - 1))),
        "temporal_gt": span(first, draw(st.integers(first + 1, 12))),
        "captions": draw(SENTENCES),
        "questions": draw(SENTENCES),
    }


def slow_box(box):
    """(box in [0, 1] or None, findings), from the pixels that it covers and those of them in the image."""
    x1, y1, x2, y2 = box
    pixels = {(x, y) for x in range(min(x1, x2), max(x1, x2)) for y in range(min(y1, y2), max(y1, y2))}
    seen = {(x, y) for x, y in pixels if x in range(W) and y in range(H)}
    if not pixels:
        return None, {EMPTY}
    findings = {SORTED} if x2 < x1 or y2 < y1 else set()
    if not seen:
        return None, findings | {OUTSIDE}
    columns, rows = {x for x, _ in seen}, {y for _, y in seen}
    box = (min(columns) / W, min(rows) / H, (max(columns) + 1) / W, (max(rows) + 1) / H)
    return box, findings | ({CLIPPED} if seen != pixels else set())


def slow_reading(records, films):
    """Every frame of every sentence is asked: in the clip, in the truth, is there a box?"""
    rows, report = [], {}
    for n, record in enumerate(records):
        film, segment, truth = films[record["vid"]], record["used_segment"], record["temporal_gt"]
        clip = [f for f in range(record["frame_count"]) if segment["begin_fid"] <= f <= segment["end_fid"]]
        asked = {f for f in range(100) if truth["begin_fid"] <= f < truth["end_fid"]}
        places = [
            (f"{n}/{kind}/{k}", s) for kind in ("captions", "questions") for k, s in enumerate(record[kind])
        ]
        for key, sentence in places:
            inside = [i for i, f in enumerate(clip) if f in asked]
            findings = {CUT} if len(inside) < len(asked) else set()
            boxes = {}
            for i in inside:
                for entry in [e for frame in film["trajectories"][clip[i] : clip[i] + 1] for e in frame]:
                    if entry["tid"] == sentence["target_id"]:
                        box, found = slow_box(entry["bbox"].values())
                        boxes |= {i: box} if box else {}
                        findings |= found
            if len(boxes) < len(inside):
                findings.add(UNBOXED)
            if not boxes:
                findings = {NO_BOX} if inside else {NO_SPAN}
            else:
                kind = "declarative" if "captions" in key else "interrogative"
                limits = (len(clip), clip[0], record["frame_count"], inside[0], inside[-1] + 1)
                rows.append((key, kind, sentence["description"], record["fps"], *limits, boxes))
            for finding in findings:
                report.setdefault(finding, []).append(key)
    return rows, report


@settings(max_examples=300, deadline=None)
@given(st.lists(random_records(), min_size=1, max_size=3), st.fixed_dictionaries({"p": FILMS, "q": FILMS}))
def test_random_files(records, films):
    films = {vid: {**film, "width": W, "height": H} for vid, film in films.items()}
    rows, report = slow_reading(records, films)
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{vid}/{vid}.json": film for vid, film in films.items()}
        if not rows:
            with pytest.raises(DataError, match="holds no sentence that can be used"):
                load(Path(folder), records, films=files)
            return
        samples, found = load(Path(folder), records, films=files)
    assert found == report
    names = "id question_type sentence fps num_frames begin_frame file_frames first_frame stop_frame boxes"
    assert rows == [tuple(getattr(sample, name) for name in names.split()) for sample in samples]
