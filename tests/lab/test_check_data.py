"""python -m lab.check_data: what it prints about a split that is all right, and about flaws."""

import contextlib
import json
import shutil
from collections import Counter

import pytest

from config import load_config
from data import CLIPPED, NO_BOX, load_samples
from lab import check_data
from prompts import format_answer, truth_answer
from qwen.checkpoint import load_tokenizer


@pytest.fixture
def config(tmp_path, write_config):
    return write_config(tmp_path, max_new_tokens=60)


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_split_that_is_all_right(config, capsys):
    check_data.main([config])
    lines = lines_of(capsys)
    assert lines[0].endswith("all.json: 6 sentences") and lines[1] == "nothing to repair"
    config = load_config(config, [])
    samples, _ = load_samples("hcstvg", config.eval_annotations, config.videos)
    answers = [format_answer(truth_answer(sample.truth(1.0), (1000, 1000))) for sample in samples]
    counts = sorted(len(load_tokenizer(config.model)[0].tokenize(answer)) + 1 for answer in answers)
    share = sum(count > 60 for count in counts) / 6
    assert f"median {counts[2]}, 95 % up to {counts[5]}, longest {counts[5]}; {share:.1%} above" in lines[2]
    assert [line.split()[:2] for line in lines[5:7]] == [["best", "100.0"], ["taught", "100.0"]]
    assert lines[7] == "6 videos: all usable"


@pytest.fixture
def broken(world, tmp_path):
    """The world with a file missing, no video, one that ends before its event, one of another rate, and a box
    that leaves the image."""
    folder = tmp_path / "broken"
    shutil.copytree(world, folder)
    (folder / "1.y4m").unlink()
    (folder / "2.y4m").write_bytes(b"no video")
    whole = (folder / "3.y4m").read_bytes()
    (folder / "3.y4m").write_bytes(whole[: len(whole) * 77 // 100])
    records = json.loads((folder / "all.json").read_text())
    records["3.y4m"] |= {"st_frame": records["3.y4m"]["img_num"], "bbox": [[5, 5, 9, 9]]}
    records["4.y4m"]["fps"] = 5
    records["5.y4m"]["bbox"][0][0] = -5
    (folder / "all.json").write_text(json.dumps(records))
    return f"videos={folder}", f"eval_annotations={folder}/all.json", "train_annotations=", "time_unit=frame"


@pytest.mark.parametrize("decode", [False, True])
def test_what_is_wrong_is_listed_and_counted(config, broken, capsys, decode):
    """The exit code is 1, unless such videos are skipped."""
    more = ["--decode", "on_bad_video=skip"] if decode else []
    with contextlib.nullcontext() if decode else pytest.raises(SystemExit, match="1"):
        check_data.main([config, *broken, *more])
    lines = lines_of(capsys)
    assert lines[2].split() == ["1", *CLIPPED.split(), "5.y4m"]
    said = ["2.y4m: 8 bytes that", "3.y4m: ends before the event", "4.y4m: lasts ", "1 videos missing: "]
    for line, words in zip(lines[-4:], said, strict=True):
        assert line.split()[:2] == ["1", "sentences"] and words in line


def test_drops_and_official_counts(config, tmp_path, capsys, monkeypatch):
    """A VidSTG split of two sentences, one without boxes; no tokenizer, and nobody looks at the videos."""
    record = {"vid": "0", "fps": 8, "frame_count": 48, "width": 56, "height": 56}
    span = {"begin_fid": 8, "end_fid": 32}
    record |= {"used_segment": span, "temporal_gt": span}
    for tid, kind in enumerate(("captions", "questions")):
        record[kind] = [{"description": "it moves.", "target_id": tid}]
    box = {"tid": 0, "bbox": {"xmin": 5, "ymin": 5, "xmax": 25, "ymax": 30}}
    (tmp_path / "0.json").write_text(json.dumps({"width": 56, "height": 56, "trajectories": [[box]] * 48}))
    path = tmp_path / "val_annotations.json"
    path.write_text(json.dumps([record] * 10))
    monkeypatch.setattr(check_data, "check_videos", lambda *_: Counter())
    config = [config, "dataset=vidstg", f"vidor={tmp_path}", f"eval_annotations={path}", "train_annotations="]
    check_data.main([*config, "on_bad_video=skip", f"model={tmp_path}/none"])
    lines = lines_of(capsys)
    assert "does not load" in lines[0] and "model=FOLDER" in lines[0]
    assert lines[1].endswith("10 sentences (10 declarative, 0 interrogative) of 20, the others dropped")
    assert lines[3].split()[:-10] == ["10", *NO_BOX.split()] and "9/questions/0" in lines[3]  # all are named
    monkeypatch.setitem(check_data.OFFICIAL, path.name, 21)  # almost
    check_data.main([*config, "on_bad_video=skip"])
    assert lines_of(capsys)[0].endswith("dropped; the official file has 21")
