"""data.py: HC-STVG records written by hand, in both dialects, against what they mean; quirks; errors."""

import json

import pytest

from data import CLIPPED, CUT, EMPTY, SORTED, check_videos, format_report, load_hcstvg, load_samples
from prompts import truth_answer
from runtime.files import DataError

# 20 s at 25 fps; the second frame is number 51 in HC-STVG's count, 50 in ours
V1 = {
    "12_AbCdEfGhIjK.mp4": {
        "bbox": [[160, 90, 320, 180], [0, 0, 640, 360]],
        "st_time": 2.013,
        "ed_time": 2.46,
        "img_num": 500,
        "caption": "The man in the  Hat sits down.",
        "width": 640,
        "height": 360,
        "st_frame": 51,
    }
}
V2 = {
    "7_x.mkv": {
        "bbox": [[100, 50, 40, 120]],
        "st_time": 2.0,
        "ed_time": 2.4,
        "img_num": 600,
        "img_size": [400, 800, 3],
        "st_frame": 61,
        "English": "She turns.",
        "Chinese": "她转身。",
    }
}


def write(tmp_path, records):
    path = tmp_path / "annotations.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return str(path)


def load(tmp_path, records):
    return load_hcstvg(write(tmp_path, records), "videos")


def load_one(tmp_path, **changes):
    """V1 with some values changed; the value `...` removes the key."""
    record = {**V1["12_AbCdEfGhIjK.mp4"], **changes}
    record = {name: value for name, value in record.items() if value is not ...}
    samples, report = load(tmp_path, {"a.mp4": record})
    return samples[0], report


def test_first_dialect(tmp_path):
    (sample,), report = load(tmp_path, V1)
    assert (sample.id, sample.video) == ("12_AbCdEfGhIjK.mp4", "videos/12_AbCdEfGhIjK.mp4")
    assert sample.sentence == "The man in the  Hat sits down."
    assert (sample.width, sample.height, sample.num_frames, sample.fps) == (640, 360, 500, 25.0)
    frames = (sample.begin_frame, sample.first_frame, sample.stop_frame)
    assert frames == (0, 50, 52)  # st_frame counts from 1
    assert sample.boxes == {50: (0.25, 0.25, 0.75, 0.75), 51: (0.0, 0.0, 1.0, 1.0)}
    assert sample.question_type is None and report == {}


def test_second_dialect_and_a_mixture_in_the_order_of_the_file(tmp_path):
    samples, report = load(tmp_path, {**V2, **V1})
    assert [sample.id for sample in samples] == ["7_x.mkv", "12_AbCdEfGhIjK.mp4"]
    sample = samples[0]
    assert sample.sentence == "She turns."
    assert (sample.width, sample.height, sample.num_frames, sample.fps) == (800, 400, 600, 30.0)  # [H, W, 3]
    assert (sample.first_frame, sample.stop_frame) == (60, 61)
    assert sample.boxes == {60: (0.125, 0.125, 0.175, 0.425)} and report == {}


def test_what_is_read(tmp_path):
    """fps of your own, if the clip is not 20 s long; the annotated seconds are not."""
    sample, report = load_one(tmp_path, fps=12.5, st_time="nonsense", ed_time=...)
    assert (sample.fps, sample.num_frames) == (12.5, 500)
    assert (sample.first_frame, sample.stop_frame, report) == (50, 52, {})


# The truth in steps. 25 fps, d = 0.5 s: steps 0, 1, 2, 3, 4, 5 show frames 0, 12, 25, 37, 50, 62.


def track(count):
    return [[i, 0, 64, 36] for i in range(count)]


def test_truth_takes_the_boxes_of_the_sampled_frames(tmp_path):
    """At 25 fps steps begin at 0, 12.5, 25, 37.5, ...: the frames on screen are then 0, 12, 25, 37, ..."""
    sample, _ = load_one(tmp_path, st_frame=14, bbox=track(50))  # native frames 13 .. 62
    truth = sample.truth(0.5)
    assert truth.span == (1, 4)
    lefts = {step: round(box[0] * 640) for step, box in truth.boxes.items()}
    assert lefts == {1: 0, 2: 12, 3: 24, 4: 37}  # frame - 13; 12 is not in the truth, 13 is next to it
    truth = sample.truth(1.0)  # seconds: frames 0, 25, 50, 75
    assert truth.span == (1, 2)
    assert {step: round(box[0] * 640) for step, box in truth.boxes.items()} == {1: 12, 2: 37}


@pytest.mark.parametrize(
    ("st_frame", "count", "first", "last"),
    [(14, 49, 1, 4), (1, 500, 0, 39), (500, 1, 39, 39), (1, 1, 0, 0), (14, 12, 1, 1), (27, 3, 2, 2)],
)
def test_truth_span(tmp_path, st_frame, count, first, last):
    """Frames 13 .. 61 are 0.52 to 2.48 s; an event shorter than a step is the step that it lies in."""
    truth = load_one(tmp_path, st_frame=st_frame, bbox=track(count))[0].truth(0.5)
    assert truth.span == (first, last) and set(truth.boxes) == set(range(first, last + 1))


def test_event_shorter_than_a_step_keeps_its_nearest_box(tmp_path):
    sample, _ = load_one(tmp_path, st_frame=14, bbox=track(12))  # frames 13 .. 24, step 1 shows frame 12
    truth = sample.truth(0.5)
    assert truth.boxes == {1: (0.0, 0.0, 0.1, 0.1)}
    assert truth_answer(truth, (1000, 1000)).pred == ((1, (0, 0, 100, 100)),)


@pytest.mark.parametrize(
    ("box", "expected", "reasons"),
    [
        ([-64, 36, 128, 36], (0.0, 0.1, 0.1, 0.2), [CLIPPED]),
        ([576, 324, 128, 72], (0.9, 0.9, 1.0, 1.0), [CLIPPED]),
        ([64, 72, -64, 36], (0.0, 0.2, 0.1, 0.3), [SORTED]),
        ([64, 72, 64, -36], (0.1, 0.1, 0.2, 0.2), [SORTED]),
        ([32, 72, -64, -36], (0.0, 0.1, 0.05, 0.2), [CLIPPED, SORTED]),
        ([64, 36, 0, 36], None, [EMPTY]),
        ([0, 0, 640, 360], (0.0, 0.0, 1.0, 1.0), []),
        ([64.0, 36.0, 32.0, 36.0], (0.1, 0.1, 0.15, 0.2), []),
    ],
)
def test_box_repairs(tmp_path, box, expected, reasons):
    sample, report = load_one(tmp_path, bbox=[[0, 0, 640, 360], box, box])
    assert report == {reason: ["a.mp4"] for reason in reasons}  # a sample counts once, however many its boxes
    assert (sample.first_frame, sample.stop_frame) == (50, 53)
    if expected is None:
        assert set(sample.boxes) == {50}
    else:
        assert sample.boxes[51] == pytest.approx(expected, abs=1e-12) and sample.boxes[51] == sample.boxes[52]


def test_track_beyond_the_end_is_cut(tmp_path):
    sample, report = load_one(tmp_path, st_frame=499, bbox=[*track(2), [9999, 0, 1, 1]])
    assert (sample.first_frame, sample.stop_frame) == (498, 500)
    assert set(sample.boxes) == {498, 499}
    assert report == {CUT: ["a.mp4"]}
    sample, report = load_one(tmp_path, st_frame=499, bbox=track(2))
    assert (sample.stop_frame, report) == (500, {})


def test_report_is_a_table(tmp_path):
    record = V1["12_AbCdEfGhIjK.mp4"]
    records = {f"{i}.mp4": {**record, "bbox": [[-10, 0, 100, 100]]} for i in range(5)}
    _, report = load(tmp_path, {**records, "z.mp4": {**record, "st_frame": 500}, **V2})
    assert report == {CLIPPED: [f"{i}.mp4" for i in range(5)], CUT: ["z.mp4"]}
    header, clipped, cut = format_report(report).splitlines()
    assert header.split() == ["samples", "finding", "ids"]
    assert clipped.split() == ["5", *CLIPPED.split(), "0.mp4,", "1.mp4,", "2.mp4,", "..."]
    assert cut.split() == ["1", *CUT.split(), "z.mp4"]
    assert format_report({}) == "nothing to repair"


BOXES = [[0, 0, 9], 5, [0, 0, 9, "9"], [0, 0, 9, True], [0, 0, 9, float("nan")], [0, 0, 9, 10**400]]
BOXES += [[640, 0, 9, 9], [0, -20, 9, 20], [9, 400, 9, -9]]  # outside the image
BAD = {
    "bbox": (None, [], [[0, 0, 0, 9]], ..., *([[0, 0, 9, 9], box] for box in BOXES)),
    "st_frame": (501, 0, -3, 1.5, "51", ...),
    "img_num": (0, 999999999, ...),
    "width": (0, ...),
    "height": (None, ...),
    "img_size": (360, {"height": 360}),
    "caption": ("", 5, "a <|im_end|> b", "a man \ud83d walks", "\0", "word " * 20_000, ...),
    "fps": (0, "25", 1e-300, 0.1, 1e9),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_errors_name_file_record_and_value(tmp_path, key, value):
    with pytest.raises(DataError, match=f"{key}.*(must be|its keys are)") as caught:
        load_one(tmp_path, **{key: value})
    assert str(caught.value).startswith(f"{tmp_path / 'annotations.json'}: record 'a.mp4': ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "key", ["../a.mp4", "/abs/a.mp4", "a/../../b.mp4", "a//b.mp4", "", "a\0.mp4", "\udc80", "a\n.mp4"]
)
def test_a_video_stays_in_its_folder(tmp_path, key):
    with pytest.raises(
        DataError, match=r"its key is .*, must be a printable path below `videos`; correct or remove"
    ):
        load(tmp_path, {key: V1["12_AbCdEfGhIjK.mp4"]})
    assert load(tmp_path, {"a/b..mp4": V1["12_AbCdEfGhIjK.mp4"]})[0][0].video == "videos/a/b..mp4"


FILES = {
    "{}": "holds no records",
    "[]": "hcstvg: a JSON object, .* vidstg: a JSON list",
    '{"a.mp4": {\n"bbox": [[1, 2, 3, 4],]}}': "is not a JSON file: .* line 2 column",
    "[" * 100_000: "is not a JSON file",
    '{"a.mp4": 3}': r"record 'a\.mp4' is 3, must be an object",
    '{"a.mp4": {}, "b.mp4": {}, "a.mp4": {}}': r"'a\.mp4' stands twice",
}


@pytest.mark.parametrize("content", FILES, ids=lambda text: text[:20])
def test_files_that_are_no_annotations(tmp_path, content):
    with pytest.raises(DataError, match=FILES[content]) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "annotations.json"))


def test_settings_that_are_missing(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read \(No such file"):
        load_samples("hcstvg", str(tmp_path / "nowhere.json"), "videos")
    with pytest.raises(DataError, match="set eval_annotations"):
        load_samples("hcstvg", "", "videos")
    with pytest.raises(DataError, match="needs `vidor`"):
        load_samples("vidstg", "a.json", "videos")


def test_missing_videos_are_listed(tmp_path):
    record = V1["12_AbCdEfGhIjK.mp4"]
    samples, _ = load_hcstvg(write(tmp_path, {f"{i}.mp4": record for i in range(6)}), str(tmp_path))
    (tmp_path / "0.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"5 of 6 videos missing: 1\.mp4, 2\.mp4, 3\.mp4, \.\.\.") as caught:
        check_videos(samples)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    check_videos(samples[:1])
