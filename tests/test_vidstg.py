"""VidSTG: records and VidOR tracks written by hand, against what they mean; flaws; errors; the counts."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import count_sentences, load_vidstg
from runtime.files import DataError
from samples import Track


def say(description, target):
    return {"description": description, "type": "person", "target_id": target}


# Of a file of 40 frames the clip is frames 10 .. 29, the truth its frames 12, 13, 14.
RECORD = {
    "vid": "2401",
    "frame_count": 40,
    "fps": 10,
    "width": 640,
    "height": 480,
    "used_segment": {"begin_fid": 10, "end_fid": 29},
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

    def entries(f):
        boxes = {tid: boxes[f] for tid, boxes in tracks.items() if f in boxes}
        return [{"tid": tid, "bbox": dict(zip(names, box, strict=True))} for tid, box in boxes.items()]

    film = {"video_path": "1203/2401.mp4", "width": 640, "height": 480}
    return changed({**film, "trajectories": [entries(f) for f in range(frames)]}, changes)


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


def test_one_record(tmp_path):
    sample, report = load_one(tmp_path)
    assert (sample.id, sample.video) == ("0/captions/0", "videos/1203/2401.mp4")
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


def test_sentences_of_several_records_in_the_order_of_the_file(tmp_path):
    """One and two questions; each sentence has its own target, and its place in the file as its id."""
    here, there = (0, 0, 320, 480), (320, 0, 640, 480)
    film = vidor({0: dict.fromkeys(range(40), here), 7: dict.fromkeys(range(40), there)})
    records = [
        {**RECORD, "questions": [say("who is chased?", 7), say("what chases the man?", 0)]},
        {**RECORD, "captions": [say("a man runs.", 7)], "questions": [say("who runs?", 7)]},
    ]
    samples, report = load(tmp_path, records, film)
    rows = [(s.id, s.question_type, s.sentence, s.boxes[2][0]) for s in samples]
    assert rows == [
        ("0/captions/0", "declarative", "a dog  chases a man with a halmet.", 0.0),
        ("0/questions/0", "interrogative", "who is chased?", 0.5),
        ("0/questions/1", "interrogative", "what chases the man?", 0.0),
        ("1/captions/0", "declarative", "a man runs.", 0.5),
        ("1/questions/0", "interrogative", "who runs?", 0.5),
    ]
    assert report == {}
    assert count_sentences(samples, report) == "5 sentences (2 declarative, 3 interrogative)"


def test_neighbours_share_a_frame(tmp_path):
    """Frame 479 is the last one of the first segment and the first one of the second."""
    film = vidor({0: {479: (0, 0, 64, 48), 480: (64, 48, 128, 96)}}, frames=1805)
    record = {**RECORD, "frame_count": 1805}
    first = {**record, "used_segment": span(0, 479), "temporal_gt": span(479, 480)}
    second = {**record, "used_segment": span(479, 1804), "temporal_gt": span(479, 481)}
    (a, b), report = load(tmp_path, [first, second], film)
    assert (a.begin_frame, a.num_frames, a.first_frame, a.stop_frame) == (0, 480, 479, 480)
    assert (b.begin_frame, b.num_frames, b.first_frame, b.stop_frame) == (479, 1326, 0, 2)
    assert a.boxes == {479: (0.0, 0.0, 0.1, 0.1)} and report == {}
    assert b.boxes == {0: (0.0, 0.0, 0.1, 0.1), 1: (0.1, 0.1, 0.2, 0.2)}


# The truth in steps. The clip is frames 37 .. 136 of the file: 100 frames at 29.97 fps, 3.34 s. Steps of half
# a second begin every 14.985 frames, at 0, 14.985, 29.97, 44.955, 59.94, 74.925, 89.91: they show frames
# 0, 14, 29, 44, 59, 74, 89 of the clip, which are 37, 51, 66, 81, 96, 111, 126 of the file.


def load_137(tmp_path, begin, end, boxes=range(200)):
    """Their boxes tell the frame of the file: x1 = f / 200 of the width."""
    film = vidor({0: {f: (f, 0, f + 10, 10) for f in boxes}}, frames=200, width=200)
    changes = {"frame_count": 200, "fps": 29.97, "width": 200, "used_segment": span(37, 136)}
    return load_one(tmp_path, film, temporal_gt=span(begin, end), **changes)[0]


@pytest.mark.parametrize(
    ("begin", "end", "step", "frames"),
    [
        # Steps begin at 37, 51.985, 66.97, 81.955, 96.94, 111.925, 126.91 and show the frames 37, 51, 66, ...
        (66, 112, 0.5, {2: 66, 3: 81, 4: 96}),
        (67, 112, 0.5, {2: 67, 3: 81, 4: 96}),  # 66 is no frame of the truth, 67 is next to it
        (75, 120, 0.5, {3: 81, 4: 96, 5: 111}),  # both edges go to the nearest: the truth is 7 frames earlier
        (66, 119, 0.5, {2: 66, 3: 81, 4: 96}),
        (37, 137, 0.5, {0: 37, 1: 51, 2: 66, 3: 81, 4: 96, 5: 111, 6: 126}),
        (127, 137, 0.5, {6: 127}),  # within the last step: its nearest box
        (82, 96, 0.5, {3: 82}),  # frames 45 .. 58 of the clip show nothing; they begin at 1.50 s, in step 3
        (66, 112, 1.0, {1: 66, 2: 96}),  # seconds show frames 0, 29, 59, 89 of the clip, 37, 66, 96, 126
    ],
)
def test_truth_in_steps(tmp_path, begin, end, step, frames):
    sample = load_137(tmp_path, begin, end)
    truth = sample.truth(step)
    assert sample.grid(step).num_steps == {0.5: 7, 1.0: 4}[step] and truth.span == (min(frames), max(frames))
    assert {step: round(box[0] * 200) for step, box in truth.boxes.items()} == frames


@pytest.mark.parametrize(
    ("boxes", "frames"),
    [
        ((66, 67, 96), {2: 66, 4: 96}),  # step 3 has none
        ((70, 80, 97), {2: 70}),  # none on a sampled frame: the nearest to frame 66 stands in
        ((65, 81, 112), {3: 81}),  # 65 and 112 are outside the truth
    ],
)
def test_truth_in_steps_without_some_boxes(tmp_path, boxes, frames):
    truth = load_137(tmp_path, 66, 112, boxes).truth(0.5)
    assert truth.span == (2, 4)  # boxes do not move it
    assert {step: round(box[0] * 200) for step, box in truth.boxes.items()} == frames


def test_frames_without_a_box_are_not_judged(tmp_path):
    sample, report = load_one(tmp_path, vidor({0: {11: walk(11), 12: walk(12), 14: walk(14)}}))
    assert (sample.first_frame, sample.stop_frame) == (2, 5)  # the span stays
    assert sample.boxes == {2: (0.3, 0.1, 0.325, 0.5), 4: (0.35, 0.1, 0.375, 0.5)}
    assert report == {data.UNBOXED: ["0/captions/0"]}


@pytest.mark.parametrize(
    ("box", "expected", "finding"),
    [
        ((-1, -1, 641, 481), (0.0, 0.0, 1.0, 1.0), data.CLIPPED),
        ((128, 48, 64, 96), (0.1, 0.1, 0.2, 0.2), data.SORTED),
        ((64, 48, 128, 48), None, data.EMPTY),
        ((640, 0, 704, 48), None, data.OUTSIDE),  # it begins where the image ends
    ],
)
def test_boxes_that_are_repaired_or_left_out(tmp_path, box, expected, finding):
    sample, report = load_one(tmp_path, vidor({0: {12: (0, 0, 640, 480), 13: box, 14: box}}))
    assert report[finding] == ["0/captions/0"]  # once, however many the boxes
    assert (data.UNBOXED in report) == (expected is None) and sample.stop_frame == 5
    assert sample.boxes.get(3) == sample.boxes.get(4) == (expected and pytest.approx(expected, abs=1e-15))


@pytest.mark.parametrize(
    ("truth", "frames"),
    [((10, 30), (0, 20)), ((29, 30), (19, 20)), ((5, 13), (0, 3)), ((28, 33), (18, 20)), ((5, 35), (0, 20))],
)
def test_a_span_that_leaves_the_clip_is_cut(tmp_path, truth, frames):
    """The clip is frames 10 .. 29 of the file."""
    sample, report = load_one(tmp_path, temporal_gt=span(*truth))
    assert (sample.first_frame, sample.stop_frame) == frames and list(sample.boxes) == list(range(*frames))
    assert round(sample.boxes[frames[0]][0] * 40) == frames[0] + 10  # still the boxes of those frames
    assert (data.CUT in report) == (truth[0] < 10 or truth[1] > 30)


@pytest.mark.parametrize("truth", [(2, 10), (30, 31), (15, 12), (12, 12)])
def test_a_span_without_a_frame_of_the_clip_is_dropped(tmp_path, truth):
    samples, report = load(tmp_path, [{**RECORD, "temporal_gt": span(*truth)}, RECORD])
    assert [s.id for s in samples] == ["1/captions/0"] and report == {data.NO_SPAN: ["0/captions/0"]}


def test_records_that_disagree_with_their_file(tmp_path):
    """A segment up to frame 40 of a file with the frames 0 .. 39. A size of 320 x 240 where VidOR says 640 x
    480, in which the boxes are measured: they stay where they are."""
    sample, report = load_one(tmp_path, used_segment=span(10, 40))
    assert (sample.begin_frame, sample.num_frames, report) == (10, 30, {data.CUT_SEGMENT: ["0/captions/0"]})
    other, report = load_one(tmp_path, width=320, height=240)
    assert report == {data.OTHER_SIZE: ["0/captions/0"]} and other.boxes == sample.boxes


@pytest.mark.parametrize("path", ["1203/2401.json", "training/1203/2401.json", "a/validation/77/2401.json"])
def test_folders_of_vidor(tmp_path, path):
    """Files of other videos, and other files, lie beside it and are not opened. The video is FOLDER/VID.mp4,
    unless the file says otherwise."""
    samples, _ = load(tmp_path / "a", [RECORD], films={path: changed(FILM, {"video_path": ...})})
    assert samples[0].video == f"videos/{path.split('/')[-2]}/2401.mp4"
    films = {path: FILM, "training/1203/12401.json": "broken", "training/9/2401.txt": "broken"}
    samples, report = load(tmp_path, [RECORD], films={**films, "2401/24010.json": "", "2401.json.zip": ""})
    assert samples[0].video == "videos/1203/2401.mp4" and len(samples[0].boxes) == 3 and report == {}


def test_several_videos(tmp_path):
    """Each has its own file, tids and size. Large data often lies elsewhere: vidor/training is a link."""
    write(tmp_path / "disk" / "1" / "a.json", vidor({0: {12: (0, 0, 64, 48)}}, video_path="1/a.mp4"))
    small = vidor({0: {12: (0, 0, 64, 48)}}, video_path="2/b.mp4", width=128, height=96)
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "training").symlink_to(tmp_path / "disk", target_is_directory=True)
    records = [{**RECORD, "vid": vid, "temporal_gt": span(12, 13)} for vid in "bab"]
    samples, _ = load(tmp_path, records, films={"2/b.json": small})
    assert [s.video for s in samples] == ["videos/2/b.mp4", "videos/1/a.mp4", "videos/2/b.mp4"]
    assert [s.boxes[2] for s in samples] == [(0, 0, 0.5, 0.5), (0, 0, 0.1, 0.1), (0, 0, 0.5, 0.5)]


def test_the_same_video_twice(tmp_path):
    films = {"training/1203/2401.json": FILM, "validation/1203/2401.json": FILM}
    with pytest.raises(DataError, match="of the same video; keep one") as caught:
        load(tmp_path, [RECORD], films=films)
    assert all(str(tmp_path / "vidor" / path) in str(caught.value) for path in films)


def test_missing_files_are_counted_and_named(tmp_path):
    records = [{**RECORD, "vid": vid} for vid in ("2401", "b", "b", "c", "d", "e")]
    with pytest.raises(DataError, match=r"4 of 5 VidOR files missing: b\.json, c\.json, d\.json, \.\.\."):
        load(tmp_path, records)


BAD_BOXES = [None, [1, 2, 3, 4], {"xmin": 0}]
BAD_BOXES += [{"xmin": 0, "ymin": v, "xmax": 9, "ymax": 9} for v in (None, "9", True, float("nan"))]
BAD_FRAMES = [None, 3, [3], ["tid"], [[0, 1]], {"0": [1]}, [{"tid": 0}], [{"tid": [0], "bbox": {}}]]
BAD_FRAMES += [[{"tid": 0, "bbox": box}] for box in BAD_BOXES]
BAD_FILMS = {
    "width": (0, ...),
    "height": ("480", None),
    "trajectories": (None, {"0": []}, ..., *([[], [], frame] for frame in BAD_FRAMES)),
    "video_path": (None, 5, "/etc/passwd", "../a.mp4", "", "a\0.mp4"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD_FILMS for value in BAD_FILMS[key]])
def test_broken_vidor_files(tmp_path, key, value):
    with pytest.raises(DataError, match=f"{key}.*(must be|its keys are)") as caught:
        load(tmp_path, [RECORD], changed(FILM, {key: value}))
    assert str(caught.value).startswith(f"{tmp_path / 'vidor' / '1203' / '2401.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


BAD_SENTENCES = [("", 0), (" \n", 0), (["a"], 0), ("a <|im_end|> b", 0), ("a", "0"), ("a", 0.5), ("a", True)]
BAD = {
    "vid": (None, ["2401"], ""),
    "frame_count": (0, 9.5, "40", True, 10**9),
    "fps": (0, -25, "25", None, float("nan"), 1e-300, 0.01, 1e9),
    "width": (0, [640]),
    "height": (None,),
    "used_segment": (None, [10, 29], {"begin_fid": 10}, span(-1, 29), span(10.5, 29), span(False, 29)),
    "temporal_gt": ("12-15", {"end_fid": 15}, span(12, "15"), span(12, None)),
    "captions": (None, say("a", 0), ["a dog"], [{"target_id": 0}], *([say(*one)] for one in BAD_SENTENCES)),
    "questions": ("who?", [say("who?", 0), None], [{"description": "who?"}]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in (*BAD[key], ...)])
def test_errors_name_file_record_and_value(tmp_path, key, value):
    with pytest.raises(DataError, match=f"{key}.*(must be|its keys are)") as caught:
        load(tmp_path, [RECORD, changed(RECORD, {key: value})])
    assert str(caught.value).startswith(f"{tmp_path / 'val.json'}: record 1: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_of_another_format(tmp_path):
    for content, said in (('{"a": {}}', "vidstg: a JSON list"), ("[3]", "record 0 is 3")):
        with pytest.raises(DataError, match=said):
            load(tmp_path, content)


def test_sentences_share_their_boxes(tmp_path):
    """Of one record and of two, about the same target: the training file has 80,684 sentences."""
    other = {**RECORD, "used_segment": span(0, 39), "temporal_gt": span(0, 30)}
    samples, _ = load(tmp_path, [{**RECORD, "questions": [say("what?", 0)]}, other])
    for sample in samples[1:]:
        assert np.shares_memory(samples[0].boxes.array, sample.boxes.array)


UNIT = st.floats(0, 1)
TRACKS = st.tuples(st.integers(0, 50), st.lists(st.none() | st.tuples(UNIT, UNIT, UNIT, UNIT), max_size=12))


def make_track(first, boxes):
    array = np.full((len(boxes), 4), np.nan)
    for k, box in enumerate(boxes):
        if box is not None:
            array[k] = box
    plain = {first + k: box for k, box in enumerate(boxes) if box is not None}
    return Track(first, array), plain


@settings(max_examples=50)
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
    assert track == make_track(*a)[0] and "5" not in track and 5.5 not in track and None not in track
    if plain:
        last = max(plain)
        assert track != {**plain, last: (2.0, 0.0, 0.0, 0.0)} and track != {**plain, last + 1: plain[last]}
        del plain[last]
        assert track != plain and plain != track


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
        return None, {data.EMPTY}
    findings = {data.SORTED} if x2 < x1 or y2 < y1 else set()
    if not seen:
        return None, findings | {data.OUTSIDE}
    columns, rows = {x for x, _ in seen}, {y for _, y in seen}
    box = (min(columns) / W, min(rows) / H, (max(columns) + 1) / W, (max(rows) + 1) / H)
    return box, findings | ({data.CLIPPED} if seen != pixels else set())


def slow_reading(records, films):
    """Every frame of every sentence is asked: in the clip, in the truth, is there a box?"""
    rows, report = [], {}
    for n, record in enumerate(records):
        film, segment, truth = films[record["vid"]], record["used_segment"], record["temporal_gt"]
        clip = [f for f in range(record["frame_count"]) if segment["begin_fid"] <= f <= segment["end_fid"]]
        asked = {f for f in range(100) if truth["begin_fid"] <= f < truth["end_fid"]}
        kinds = ("captions", "questions")
        places = {f"{n}/{kind}/{k}": s for kind in kinds for k, s in enumerate(record[kind])}
        for key, sentence in places.items():
            inside = [i for i, f in enumerate(clip) if f in asked]
            findings = {data.CUT} if len(inside) < len(asked) else set()
            boxes = {}
            for i in inside:
                for entry in [e for frame in film["trajectories"][clip[i] : clip[i] + 1] for e in frame]:
                    if entry["tid"] == sentence["target_id"]:
                        box, found = slow_box(entry["bbox"].values())
                        boxes |= {i: box} if box else {}
                        findings |= found
            if len(boxes) < len(inside):
                findings.add(data.UNBOXED)
            if not boxes:
                findings = {data.NO_BOX} if inside else {data.NO_SPAN}
            else:
                kind = "declarative" if "captions" in key else "interrogative"
                limits = (len(clip), clip[0], record["frame_count"], inside[0], inside[-1] + 1)
                rows.append((key, kind, sentence["description"], record["fps"], *limits, boxes))
            for finding in findings:
                report.setdefault(finding, []).append(key)
    return rows, report


@settings(max_examples=50, deadline=None)
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
