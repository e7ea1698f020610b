"""`python data.py --check CONFIG`: what it prints about the toy world, and about what is wrong with one."""

import contextlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vocabulary import qwen_tokenizer

import data
from config import load_config
from data import load_samples
from lab import check_data
from prompts import format_answer, truth_answer
from qwen.checkpoint import load_policy
from runtime.files import ModelError

ROOT = Path(__file__).parent.parent.parent


def lines_of(arguments, capsys, code=0):
    """What it prints, blank lines left out."""
    with pytest.raises(SystemExit) if code else contextlib.nullcontext():
        check_data.main(["--check", *arguments])
    captured = capsys.readouterr()
    return [line for line in captured.out.splitlines() if line], captured.err


@pytest.fixture
def place(tmp_path, write_config, checkpoints):
    return write_config(tmp_path, think=True, max_new_tokens=60)


def test_a_split_that_is_all_right(place, capsys):
    lines, _ = lines_of([place], capsys)
    assert lines[0].endswith("all.json: 6 sentences") and lines[1] == "annotations: nothing to repair"
    row = lines[3].split()
    heads = "true answers, in tokens N mean 50 % 90 % 95 % 99 % 100 % above max_new_tokens 60"
    assert " ".join(lines[2].split()) == heads
    config = load_config(place)
    lengths = answer_lengths(config, load_policy(config.model).tokenizer)
    assert row[:3] == ["all", "6", f"{sum(lengths) / 6:.0f}"]
    assert row[3:8] == [str(sorted(lengths)[k]) for k in (2, 5, 5, 5, 5)]
    assert row[8] == f"{sum(n > 60 for n in lengths) / 6:.1%}" != "0.0%"
    assert lines[4] == "the best score in steps of 1 s"
    assert [line.split()[0] for line in lines[6:9]] == ["native", "stcat", "tubedetr"]
    assert lines[6].split()[1] == "100.0" and lines[9:] == ["6 videos, by their headers: all good"]
    assert lines_of([place, "--decode"], capsys)[0][-1] == "6 videos, decoded: all good"


def answer_lengths(config, tokenizer):
    """Of all true answers in thousandths, and the token that ends each."""
    samples, _ = load_samples("hcstvg", config.eval_annotations, config.videos)
    texts = [format_answer(truth_answer(s.truth(1.0), (1000, 1000))) for s in samples]
    return [len(tokenizer.tokenize(text)) + 1 for text in texts]


@pytest.fixture
def broken(world, tmp_path):
    """The world with one file missing, one that is no video, one cut off, one of another rate, and a box that
    leaves the image."""
    folder = tmp_path / "broken"
    shutil.copytree(world, folder)
    (folder / "1.y4m").unlink()
    (folder / "2.y4m").write_bytes(b"no video")
    whole = (folder / "3.y4m").read_bytes()
    (folder / "3.y4m").write_bytes(whole[: len(whole) * 9 // 10])
    records = json.loads((folder / "all.json").read_text())
    records["4.y4m"]["fps"] = 5
    records["5.y4m"]["bbox"][0][0] = -5
    (folder / "all.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("decode", [[], ["--decode"]], ids=["headers", "decode"])
def test_what_is_wrong_is_listed_and_counted(place, broken, capsys, decode):
    settings = [f"videos={broken}", f"eval_annotations={broken}/all.json", "train_annotations="]
    lines, _ = lines_of([place, *settings, *decode], capsys, code=1)
    assert lines[2].split() == ["1", *data.CLIPPED.split(), "5.y4m"]
    at = next(k for k, line in enumerate(lines) if line.startswith("5 videos, "))
    assert lines[-1].startswith("  1 of 6 videos missing: ") and lines[-1].endswith("1.y4m")
    problems = dict(zip(lines[at + 1 : -1 : 2], lines[at + 2 : -1 : 2], strict=True))
    said = ["2.y4m: 8 bytes that", "4.y4m: lasts 6.00 s, but its annotation"]
    if not decode:  # of the sampled frames all are there: the last is held for half a second
        said.insert(1, "3.y4m: ends at 5.25 s, what exists is used")
    for words, (problem, sentences) in zip(said, problems.items(), strict=True):
        assert words in problem and sentences.startswith("    1 sentences: ")


def test_sentences_of_both_types_and_official_counts(place, tmp_path, world, capsys):
    """A VidSTG split of the same films: one caption and one question each, one of them without boxes."""
    records = []
    for n in range(6):
        track = {"begin_fid": 8, "end_fid": 32}
        records.append(
            {
                "vid": str(n), "fps": 8, "frame_count": 48, "width": 56, "height": 56,
                "used_segment": {"begin_fid": 0, "end_fid": 47}, "temporal_gt": track,
                "captions": [{"description": "it moves.", "type": "object", "target_id": 0}],
                "questions": [{"description": "what moves?", "type": "object", "target_id": int(n == 5)}],
            }
        )  # fmt: skip
        box = {"tid": 0, "bbox": {"xmin": 5, "ymin": 5, "xmax": 25, "ymax": 30}}
        film = {"width": 56, "height": 56, "video_path": f"{n}.y4m", "trajectories": [[box]] * 48}
        (tmp_path / "vidor").mkdir(exist_ok=True)
        (tmp_path / "vidor" / f"{n}.json").write_text(json.dumps(film))
    path = tmp_path / "val_annotations.json"
    path.write_text(json.dumps(records))
    settings = ["dataset=vidstg", f"vidor={tmp_path}/vidor", f"eval_annotations={path}", "train_annotations="]
    lines, _ = lines_of([place, *settings], capsys)
    assert lines[0].endswith(
        "11 sentences (6 declarative, 5 interrogative) of 12, the others dropped;"
        " the official file of this name has 8956"
    )
    assert lines[2].split() == ["1", *data.NO_BOX.split(), "5/questions/0"]
    tokens = [line.split() for line in lines if line.startswith(("all", "declarative", "interrogative"))]
    assert [row[:2] for row in tokens] == [["all", "11"], ["declarative", "6"], ["interrogative", "5"]]
    assert any(line.startswith("tubedetr interrogative ") for line in lines)


def test_without_a_tokenizer(place, capsys, tmp_path):
    lines, _ = lines_of([place, f"model={tmp_path}/none"], capsys)
    assert any(line.startswith("true answers: not counted in tokens (model: '") for line in lines)
    assert lines[-1] == "6 videos, by their headers: all good"
    with pytest.raises(ModelError, match="does not load"):  # how large are the frames of no model?
        check_data.main(
            ["--check", place, f"model={tmp_path}/none", "--decode", f"frame_cache={tmp_path}/cache"]
        )


def test_closed_models_answer_in_another_form(place, capsys):
    csv = ["answer_format=csv", "coordinates=relative", "think=false"]
    assert "true answers: not counted in tokens for answer_format: csv" in lines_of([place, *csv], capsys)[0]


def test_a_part_of_a_large_split_is_counted(place, capsys, monkeypatch):
    monkeypatch.setattr(check_data, "MOST", 4)
    lines, _ = lines_of([place], capsys)
    assert lines[2].startswith("4 true answers, in tokens") and lines[3].split()[:2] == ["all", "4"]


def test_lengths_in_tokens_of_the_real_vocabulary(place, capsys, tmp_path):
    qwen_tokenizer().save_pretrained(tmp_path / "qwen")
    shutil.copy(Path(load_config(place).model) / "config.json", tmp_path / "qwen")
    lines, _ = lines_of([place, f"model={tmp_path}/qwen"], capsys)
    row = next(line for line in lines if line.startswith("all")).split()
    lengths = answer_lengths(load_config(place), qwen_tokenizer())
    assert (row[2], row[7]) == (f"{sum(lengths) / 6:.0f}", str(max(lengths)))


def test_bad_videos_that_are_skipped_are_no_failure(place, broken, capsys):
    settings = [f"videos={broken}", f"eval_annotations={broken}/all.json", "train_annotations="]
    lines, _ = lines_of([place, *settings, "on_bad_video=skip"], capsys)
    assert "1 of 6 videos missing" in lines[-1]


def test_questions_for_a_chat_model(place, tmp_path, world, capsys):
    """A VidSTG clip that begins at frame 8 of 8 a second, in the second second of its file."""
    box = {"tid": 0, "bbox": {"xmin": 5, "ymin": 5, "xmax": 25, "ymax": 30}}
    film = {"width": 56, "height": 56, "video_path": "0/0.mp4", "trajectories": [[box]] * 48}
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "0.json").write_text(json.dumps(film))
    clip, truth = {"begin_fid": 8, "end_fid": 43}, {"begin_fid": 10, "end_fid": 20}
    record = {"vid": "0", "fps": 8, "frame_count": 48, "width": 56, "height": 56}
    record |= {"used_segment": clip, "temporal_gt": truth, "captions": []}
    record |= {"questions": [{"description": "谁在动?", "type": "person", "target_id": 0}]}
    (tmp_path / "val.json").write_text(json.dumps([record]))
    settings = ["dataset=vidstg", f"vidor={tmp_path}/vidor", f"eval_annotations={tmp_path}/val.json"]
    settings += ["answer_format=csv", "coordinates=relative", "think=false", "videos=films"]
    check_data.main(["--questions", place, *settings])
    (line,) = capsys.readouterr().out.splitlines()
    question = json.loads(line)
    assert (
        question["prompt"].endswith("\nEvent: 谁在动?") and "timestamp, x1, y1, x2, y2" in question["prompt"]
    )
    del question["prompt"]
    assert question == {"id": "0/questions/0", "video": "films/0/0.mp4", "begin": 1.0, "end": 5.5}


def test_command_line(place, tmp_path, capsys, monkeypatch):
    command = [sys.executable, str(ROOT / "data.py"), "--check", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "6 videos, by their headers: all good" in done.stdout
    for arguments, said in (
        (["--check", str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
        (
            ["--check", place, "train_annotations=", "eval_annotations="],
            "names neither train_annotations nor",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
        assert caught.value.code.startswith("error: ") and said in caught.value.code
