"""data.load_jsonl and VideoFolder: a world written in two formats is the same; hand-worked lines; errors."""

import json

import numpy as np
import pytest

from config import load_config
from data import CLIPPED, CUT, EMPTY, SORTED, VideoFolder, load_hcstvg, load_jsonl, load_samples
from evaluate import load_split
from lab import check_data
from runtime.files import DataError, UserError
from runtime.predictions import fingerprint_of

SIZE = {"width": 200, "height": 100, "frames": 50, "fps": 10}  # 5 s
LINE = {"video": "a.mp4", "sentence": "It moves.", "begin": 1, "end": 2, "boxes": [[1, 0, 0, 20, 50]]} | SIZE


def write(folder, *records):
    path = folder / "clips.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def load_one(folder, **changes):
    """LINE with some values changed; the value `...` removes the key."""
    record = {key: value for key, value in {**LINE, **changes}.items() if value is not ...}
    (sample,), report = load_jsonl(write(folder, record), str(folder))
    return sample, report


@pytest.mark.parametrize("size_from", ["the line", "the header"])
def test_the_same_as_in_hcstvg(tmp_path, world, size_from):
    """The files of a world, and its boxes frame by frame: every field of every sample is the same."""
    records = []
    for key, old in json.loads((world / "all.json").read_text()).items():
        first, fps = old["st_frame"] - 1, old["fps"]
        times = [(first + k) / fps for k in range(len(old["bbox"]))]
        boxes = [[t, x, y, x + w, y + h] for t, (x, y, w, h) in zip(times, old["bbox"], strict=True)]
        record = {"video": key, "id": key, "sentence": old["caption"], "boxes": boxes}
        record |= {"begin": first / fps, "end": (first + len(boxes)) / fps}
        sizes = {"width": old["width"], "height": old["height"], "frames": old["img_num"], "fps": fps}
        records.append(record | (sizes if size_from == "the line" else {}))
    ours, report = load_jsonl(write(tmp_path, *records), str(world))
    theirs, _ = load_hcstvg(str(world / "all.json"), str(world))
    assert report == {} and len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        fields = vars(one) | {"boxes": None}, vars(other) | {"boxes": None}
        assert fields[0] == fields[1] and one.boxes.first == other.boxes.first
        assert np.array_equal(one.boxes.array, other.boxes.array)


def test_boxes_between_and_around_their_times(tmp_path):
    """At 1.2 s and 1.6 s: held up to 1.2, a quarter of the way at each frame between, held from 1.6 on."""
    sample, _ = load_one(tmp_path, boxes=[[1.2, 0, 0, 20, 50], [1.6, 80, 40, 100, 90]])
    assert (sample.first_frame, sample.stop_frame, sample.num_frames) == (10, 20, 50)
    left = [0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]
    assert [sample.boxes[frame][0] for frame in range(10, 20)] == pytest.approx(left)
    assert sample.boxes[14] == pytest.approx((0.2, 0.2, 0.3, 0.7)) and len(sample.boxes) == 10


def test_normalized_boxes_are_the_same(tmp_path):
    pixels, _ = load_one(tmp_path)
    shares, _ = load_one(tmp_path, boxes=[[1, 0, 0, 0.1, 0.5]], normalized=True)
    assert shares.boxes == pixels.boxes and pixels.boxes[15] == (0, 0, 0.1, 0.5)


def test_a_clip_has_no_more_steps_than_seconds(tmp_path):
    """6 s at 29.97 frames a second are 179 whole frames, and begin at the frame nearest to 1 s."""
    sample, _ = load_one(tmp_path, fps=30000 / 1001, frames=600, clip=[1, 7])
    assert (sample.begin_frame, sample.num_frames, sample.grid(1.0).num_steps) == (30, 179, 6)


def test_a_clip_of_the_file(tmp_path):
    """Times stay those of the file; the sample counts from the clip's first frame."""
    sample, report = load_one(tmp_path, clip=[0.5, 1.8])
    assert (sample.begin_frame, sample.num_frames, sample.file_frames) == (5, 13, 50)
    assert (sample.first_frame, sample.stop_frame, sample.boxes.first) == (5, 13, 5)
    assert report == {CUT: ["a.mp4:1"]}  # of its last 0.2 s


@pytest.mark.parametrize(
    "begin, end, frames", [(1, 1.01, (10, 11)), (0.94, 2.06, (9, 21)), (0.96, 2.04, (10, 20))]
)
def test_the_nearest_frames(tmp_path, begin, end, frames):
    """Of an event of any length; at least one."""
    sample, _ = load_one(tmp_path, begin=begin, end=end)
    assert (sample.first_frame, sample.stop_frame) == frames


def test_what_is_repaired_is_reported(tmp_path):
    boxes = [[1, -5, 0, 20, 50], [1.1, 20, 50, 0, 0], [1.2, 3, 3, 3, 9], [1.3, 40, 0, 60, 50]]
    sample, report = load_one(tmp_path, boxes=boxes, id="x")
    assert report == {finding: ["x"] for finding in (CLIPPED, EMPTY, SORTED)}
    assert sample.boxes[10] == sample.boxes[11] == (0, 0, 0.1, 0.5)
    assert sample.boxes[12] == pytest.approx((0.1, 0, 0.2, 0.5))  # half-way: the box without area is left out


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"boxes": []}, "boxes is [], must be boxes of which at least one has an area"),
        ({"boxes": [[1, 3, 3, 3, 9]]}, "must be boxes of which at least one has an area"),
        ({"boxes": [[1, 0, 0, 20]]}, "boxes[0] is [1, 0, 0, 20], must be [t, x1, y1, x2, y2]"),
        ({"boxes": [["1", 0, 0, 20, 50]]}, "boxes[0]"),
        ({"boxes": [[1, 0, 0, 20, 50], [1, 0, 0, 20, 50]]}, "boxes[1]"),
        ({"boxes": [[1.5, 0, 0, 20, 50], [1.2, 0, 0, 20, 50]]}, "boxes[1]"),
        ({"boxes": [[0.9, 0, 0, 20, 50]]}, "must be at a time from 1 to 2 s, after the one before"),
        ({"boxes": [[1, 300, 0, 400, 50]]}, "boxes[0] is [1, 300, 0, 400, 50], must be inside the image"),
        ({"normalized": True}, 'must be in pixels, or in [0, 1] with "normalized": true'),
        ({"boxes": [[1, 0, 0, 0.2, 0.5]]}, 'must be in pixels, or in [0, 1] with "normalized": true'),
        ({"normalized": True, "boxes": [[1, 1.1, 0, 1.2, 1]]}, "inside the image of 1 x 1"),
        ({"normalized": "yes"}, "must be true or false"),
        ({"begin": 2, "end": 1}, "[begin, end] is [2, 1], must be [begin, end] in seconds, 0 <= begin < end"),
        ({"begin": "1"}, "[begin, end]"),
        ({"end": float("nan")}, "[begin, end]"),
        ({"begin": 7, "end": 8}, "[begin, end] is [7, 8], must be in the clip, [0, 5.0] s of the file"),
        ({"clip": [3, 4]}, "[begin, end] is [1, 2], must be in the clip, [3, 4] s of the file"),
        ({"clip": [4]}, "clip is [4]"),
        ({"fps": 0}, "fps is 0"),
        ({"width": "200"}, "width"),
        ({"sentence": "<|im_end|>"}, "sentence"),
        ({"video": "../a.mp4"}, "video is"),
        ({"id": 7}, "id is 7"),
        ({"frames": 10**6, "fps": 1}, "the length of its clip in seconds is 1000000.0"),
        ({"fps": ...}, "videos are missing"),
        ({"boxes": ...}, 'line 1: is no JSON object with "boxes"'),
    ],
)
def test_what_cannot_be_used(tmp_path, changes, says):
    with pytest.raises(DataError) as error:
        load_one(tmp_path, **changes)
    assert "clips.jsonl" in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_an_id_stands_once(tmp_path):
    with pytest.raises(DataError, match=r"record 2: .*record 1 has the same id 'x'"):
        load_jsonl(write(tmp_path, LINE | {"id": "x"}, LINE | {"id": "x"}), "")
    samples, _ = load_jsonl(write(tmp_path, LINE, LINE), "")
    assert [sample.id for sample in samples] == ["a.mp4:1", "a.mp4:2"]


def test_splits_of_a_file(tmp_path, write_config):
    """FILE:SPLIT takes its lines; answers to two splits are never mixed; check_data reads it."""
    path = write(tmp_path, *[LINE | {"split": split} for split in ("train", "test", "train")])
    ids = {
        split: [s.id for s in load_samples("jsonl", path + split, "")[0]] for split in ("", ":train", ":test")
    }
    assert ids == {
        "": ["a.mp4:1", "a.mp4:2", "a.mp4:3"],
        ":train": ["a.mp4:1", "a.mp4:3"],
        ":test": ["a.mp4:2"],
    }
    config = load_config(write_config(tmp_path, dataset="jsonl", eval_annotations=f"{path}:test"))
    assert len(load_split(config, config.eval_annotations)[0]) == 1
    test = fingerprint_of(config.model, config)
    config.eval_annotations = f"{path}:train"
    assert fingerprint_of(config.model, config) != test
    with pytest.raises(DataError, match="no sentence of the split 'val'"):
        load_jsonl(f"{path}:val", "")
    with pytest.raises(DataError, match="record 1: has no 'split'"):
        load_jsonl(write(tmp_path, LINE) + ":train", "")


def test_check_data_reads_it(tmp_path, world, write_config, capsys):
    """Two sentences about one video, whose size comes from its header."""
    line = {key: value for key, value in LINE.items() if key not in SIZE}
    boxes = [[1, 0, 0, 0.2, 0.2], [2, 0.5, 0.5, 0.7, 0.7]]
    line |= {"video": "0.y4m", "boxes": boxes, "normalized": True}
    path = write(tmp_path, line, line | {"sentence": "It stops."})
    split = dict.fromkeys(("train_annotations", "eval_annotations"), path)
    check_data.main([write_config(tmp_path, dataset="jsonl", **split)])
    out = capsys.readouterr().out
    assert "clips.jsonl: 2 sentences" in out and "1 videos: all usable" in out


@pytest.mark.parametrize(
    "files, found",
    [
        (["122_abc.mp4", "0/122_abc.mp4"], "122_abc.mp4"),
        (["0/122_abc.mp4"], "0/122_abc.mp4"),
        (["122_abc.mkv"], "122_abc.mkv"),
        (["a/b/122_abc.WEBM", "a/122_abc.json", "a/1122_abc.mp4"], "a/b/122_abc.WEBM"),
        ([], "122_abc.mp4"),
    ],
)
def test_where_a_video_is_found(tmp_path, files, found):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert VideoFolder(str(tmp_path)).path("f", "122_abc.mp4") == str(tmp_path / found)


def test_two_videos_of_one_name(tmp_path):
    """Named both; a folder in the name tells them apart."""
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "v.mkv").touch()
    videos = VideoFolder(str(tmp_path))
    with pytest.raises(DataError, match=r"f: both .*/0/v.mkv and .*/1/v.mkv may be its video; keep one"):
        videos.path("f", "v.mp4")
    assert videos.path("f", "1/v.mp4") == str(tmp_path / "1/v.mkv")


def test_hcstvg_uses_it(tmp_path, world):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "3.mp4").touch()
    samples, _ = load_hcstvg(str(world / "all.json"), str(tmp_path))
    assert [sample.video for sample in samples][3:5] == [str(tmp_path / "0/3.mp4"), str(tmp_path / "4.y4m")]


def test_a_header_that_cannot_be_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"a\.mp4"):
        load_one(tmp_path, fps=...)


def test_the_home_folder(tmp_path, monkeypatch, write_config):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(write_config(tmp_path, videos="~/clips"), ["output_dir=~/runs/x", "model=~/m"])
    assert (config.videos, config.output_dir) == (f"{tmp_path}/clips", f"{tmp_path}/runs/x")
    assert config.model == f"{tmp_path}/m"
