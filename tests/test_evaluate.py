"""The script part of evaluate.py: saved answers, checkpoints and run folders to the paper's row."""

import contextlib
import dataclasses
import itertools
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluate
from config import load_config, save_config
from data import load_samples
from lab import controls
from metrics import grid_ceiling
from prompts import Answer, format_answer, parse_answer, truth_answer
from qwen.checkpoint import load_policy
from rewards import load_file
from toy import world as toy_world
from video.loader import open_loader

ROOT = Path(__file__).parent.parent
PROTOCOLS = {"native", "stcat", "tubedetr"}
SCORES = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
ROW = {*SCORES, "N", "failures", "ceiling_m_tIoU", "ceiling_m_vIoU"}


@pytest.fixture
def place(tmp_path, write_config):
    """A configuration whose videos and model do not exist: re-scoring needs neither."""
    return write_config(tmp_path, videos=str(tmp_path / "gone"), model=str(tmp_path / "none"))


def oracle(config, scale=(1000, 1000)):
    """The truth as answers: id -> completion."""
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos)
    truths = {s.id: s.truth(config.text_format.step_seconds) for s in samples}
    return {i: format_answer(truth_answer(truth, scale, config.think)) for i, truth in truths.items()}


def write(path, completions, **more):
    lines = [json.dumps({"id": i, "completion": c, **more}) for i, c in completions.items()]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def rescore(capsys, *arguments):
    """The one JSON object on stdout."""
    evaluate.main(["--predictions", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def same_answers(path, other, count=None):
    """Whether two files of predictions say the same, but for how they were made."""
    both = [[json.loads(line) for line in p.read_text().splitlines()][:count] for p in (path, other)]
    for record in itertools.chain(*both):
        record.pop("made", None)
    return both[0] == both[1]


def error_of(arguments, monkeypatch):
    """What the script exits with: sys.exit(text) prints it to stderr, and the exit code is 1."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------
# Saved answers


def test_oracle_reaches_the_ceiling(place, tmp_path, capsys):
    config = load_config(place)
    path = write(tmp_path / "oracle.jsonl", oracle(config))
    rows = rescore(capsys, path, place)
    assert rows.pop("think")["gain"] == 0
    assert rows.keys() == PROTOCOLS and all(row.keys() == ROW for row in rows.values())
    samples, _ = load_samples("hcstvg", config.eval_annotations, config.videos)
    for protocol, row in rows.items():
        best = grid_ceiling(samples, config.text_format, protocol)
        assert best == {key: row[key] for key in (*SCORES, "N", "failures")}
        assert (row["ceiling_m_tIoU"], row["ceiling_m_vIoU"]) == (best["m_tIoU"], best["m_vIoU"])
    assert rows["native"]["m_tIoU"] == pytest.approx(100)  # toy events fill whole seconds
    # Boxes are interpolated between seconds and held in the last one; 1/8 of a second's way is lost at most.
    assert rows["native"]["m_vIoU"] > 75 and rows["native"]["vIoU@0.5"] == 100
    assert (rows["native"]["N"], rows["native"]["failures"]) == (6, 0)


@pytest.mark.parametrize(
    "changes", [{"think": False}, {"time_unit": "frame", "fps": 4}, {"coordinates": "original"}]
)
def test_answers_are_read_as_the_config_says(place, tmp_path, capsys, changes):
    """At 4 steps a second each native frame of the toy world has its box; 56 pixels are a coarse scale."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = load_config(place, overrides)
    scale = (56, 56) if config.coordinates == "original" else (1000, 1000)
    path = write(tmp_path / "oracle.jsonl", oracle(config, scale))
    row = rescore(capsys, path, place, *overrides)["native"]
    assert row["m_tIoU"] == pytest.approx(100) and row["failures"] == 0
    assert row["m_vIoU"] > (99 if "fps" in changes else 75)
    if "think" in changes:
        assert rescore(capsys, path, place)["native"]["failures"] == 6  # the other grammar


def test_failures_count(place, tmp_path, capsys):
    """Of six answers one is missing, one does not parse, one ends before it starts: half of the row stays."""
    answers = oracle(load_config(place))
    whole = rescore(capsys, write(tmp_path / "a.jsonl", answers), place)["native"]
    del answers["0.y4m"]
    answers["1.y4m"] = "I do not know"
    box = ((3, (0, 0, 9, 9)),)
    answers["2.y4m"] = format_answer(Answer(3, 1, box, box))
    row = rescore(capsys, write(tmp_path / "b.jsonl", answers), place)["native"]
    assert (row["N"], row["failures"]) == (6, 3)
    assert row["m_tIoU"] == pytest.approx(whole["m_tIoU"] / 2) and row["vIoU@0.5"] == pytest.approx(50)
    nothing = rescore(capsys, write(tmp_path / "c.jsonl", {}), place)["native"]
    assert {key: nothing[key] for key in SCORES} == dict.fromkeys(SCORES, 0)
    assert (nothing["N"], nothing["failures"]) == (6, 6)


def test_resized_needs_the_size_that_the_model_saw(place, tmp_path, capsys, monkeypatch):
    config = load_config(place, ["coordinates=resized"])
    answers = oracle(config, (28, 56))
    good = write(tmp_path / "good.jsonl", answers, scale=[28, 56])
    row = rescore(capsys, good, place, "coordinates=resized")["native"]
    assert row["failures"] == 0 and row["vIoU@0.5"] == 100
    for more in ({}, {"scale": 5}, {"scale": [28]}, {"scale": [0, 56]}, {"scale": ["28", "56"]}):
        bad = write(tmp_path / "bad.jsonl", answers, **more)
        message = error_of(["--predictions", bad, place, "coordinates=resized"], monkeypatch)
        assert "'0.y4m': with coordinates: resized each needs \"scale\": [width, height]" in message


def test_eval_limit_is_the_runs(place, tmp_path, capsys, monkeypatch):
    """The first sentences alone are asked for, and answered."""
    answers = oracle(load_config(place))
    path = write(tmp_path / "two.jsonl", {i: answers[i] for i in ("0.y4m", "1.y4m")})
    row = rescore(capsys, path, place, "eval_limit=2")["native"]
    assert (row["N"], row["failures"]) == (2, 0)
    assert "'1.y4m': no such sentence" in error_of(
        ["--predictions", path, place, "eval_limit=1"], monkeypatch
    )


def test_bad_predictions(place, tmp_path, capsys, monkeypatch):
    line = json.dumps({"id": "0.y4m", "completion": "x"}) + "\n"
    path = tmp_path / "bad.jsonl"
    form = 'bad.jsonl, line 2: is no JSON object with "id", "completion"; correct or remove it'
    texts = 'bad.jsonl, line 2: "id" and "completion" must be texts'
    cases = {
        line + line: "bad.jsonl, line 2: '0.y4m' is answered in line 1; keep one",
        line.replace("0.y4m", "9.y4m"): "prediction '9.y4m': no such sentence in",
        line + "{": form,
        line + "[1]\n": form,
        line + "5\n": form,
        line + '"id completion"\n': form,
        line + "\n" + line.replace("0.y4m", "1.y4m"): form,  # an empty line is allowed at the end only
        line + '{"id": "1.y4m"}\n': form,
        line + '{"id": 1, "completion": "x"}\n': texts,
        line + '{"id": ["a"], "completion": "x"}\n': texts,
        line + '{"id": "1.y4m", "completion": null}\n': texts,
        line + '{"id": "1.y4m", "comple': form,  # an answer that was cut is not left out
        line + "[" * 100_000 + "\n": form,
    }
    for text, message in cases.items():
        path.write_text(text)
        assert message in error_of(["--predictions", str(path), place], monkeypatch)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        assert "cannot be read" in error_of(["--predictions", str(missing), place], monkeypatch)
    path.write_bytes(line.encode() + b"\xff\xfe")
    assert form in error_of(["--predictions", str(path), place], monkeypatch)
    assert capsys.readouterr().out == ""


def test_a_line_ends_where_json_lines_end(place, tmp_path, capsys):
    """U+2028 and its like may stand in a JSON string as they are; Python's splitlines would cut there."""
    text = json.dumps({"id": "0.y4m", "completion": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "odd.jsonl").write_text(text + "\r\n", encoding="utf-8")
    assert rescore(capsys, str(tmp_path / "odd.jsonl"), place)["native"]["failures"] == 6


def test_command_line(place, tmp_path, monkeypatch, capfd):
    """One JSON object and nothing else on stdout, down to the file descriptor."""
    path = write(tmp_path / "oracle.jsonl", oracle(load_config(place)))
    arguments = ["evaluate.py", "--predictions", path, place, "fps=4", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    captured = capfd.readouterr()
    assert json.loads(captured.out)["native"]["m_tIoU"] == pytest.approx(100)
    assert captured.err.count("\n") == 2  # the split and what was found in it


def test_settings_that_are_wrong(place, tmp_path, monkeypatch, capsys):
    assert "unknown key fpss" in error_of(["--predictions", "x", place, "fpss=1"], monkeypatch)
    none = str(tmp_path / "none.yaml")
    for arguments in ([str(tmp_path), none], ["a", place, none], ["--predictions", "x", place, none]):
        assert "none.yaml: cannot be read" in error_of(arguments, monkeypatch)
    nothing = error_of(["--predictions", "x", place, "eval_annotations="], monkeypatch)
    assert (
        nothing == "error: no annotation file is named: set eval_annotations, and train_annotations to train"
    )
    nowhere = str(tmp_path / "none" / "x")
    assert f"{nowhere} is no run of train.py, nor a checkpoint in one" in error_of([nowhere], monkeypatch)
    for arguments in (
        [],
        ["--predictions", "x"],
        ["--predictions", "x", "--data", "seed=1"],
        ["--predictions", "x", place, "--data", place],
        ["--predictions", "x", "--data", place, "--control", "blank"],
        ["--predictions", "x", "--data", place, "--output", "y"],
        ["--data", place],
        ["--control", "upside-down", str(tmp_path)],
        ["--table", "a", "b", "--json"],
        ["--json", "a", "--table", "b"],
    ):
        with pytest.raises(SystemExit) as caught:
            evaluate.main(arguments)
        assert caught.value.code == 2 and "error: " in capsys.readouterr().err  # argparse's, with the usage


def test_several_configurations(place, tmp_path, capsys):
    """Laid over one another, the settings of the command line over all, wherever they stand."""
    (tmp_path / "no_draft.yaml").write_text("think: false\n")
    (tmp_path / "frames.yaml").write_text("time_unit: frame\nfps: 4\n")
    files = [place, str(tmp_path / "no_draft.yaml"), str(tmp_path / "frames.yaml")]
    path = write(tmp_path / "oracle.jsonl", oracle(load_config(files)))
    for arguments in (["--data", *files], files, ["--data", *files, "seed=1"], ["seed=1", "--data", *files]):
        row = rescore(capsys, path, *arguments)["native"]
        assert row["failures"] == 0 and row["m_tIoU"] == pytest.approx(100) and row["m_vIoU"] > 99
    assert rescore(capsys, path, "--data", *files, "think=true")["native"]["failures"] == 6
    assert rescore(capsys, path, "--data", place)["native"]["failures"] == 6


def test_what_final_boxes_gain(place, tmp_path, capsys):
    """Of six answers one gains, one loses, two stay, one does not parse, one is missing. The mean of the
    thinking boxes is the row of the same answers with these boxes in the place of the final ones."""
    config = load_config(place)
    truths = {key: parse_answer(text) for key, text in oracle(config).items()}

    def away(answer, which):  # the boxes of one list, where nothing is
        items = tuple((step, (0, 0, 1, 1)) for step, _ in getattr(answer, which))
        return format_answer(dataclasses.replace(answer, **{which: items}))

    answers = {key: format_answer(truths[key]) for key in ("0.y4m", "1.y4m")}
    answers |= {"2.y4m": away(truths["2.y4m"], "think"), "3.y4m": away(truths["3.y4m"], "pred"), "4.y4m": "x"}
    swapped = {}
    for key, text in answers.items():
        answer = parse_answer(text)
        swapped[key] = (
            text if answer is None else format_answer(dataclasses.replace(answer, pred=answer.think))
        )
    mean = {}
    for name, texts in (("pred", answers), ("think", swapped)):
        rows = rescore(capsys, write(tmp_path / f"{name}.jsonl", texts), place)
        mean[name] = rows["native"]["m_vIoU"] * 6 / 4  # without the two that have no boxes
        single = rescore(capsys, write(tmp_path / f"{name}.jsonl", {"2.y4m": texts["2.y4m"]}), place)
        mean[name, 2] = single["native"]["m_vIoU"] * 6
        single = rescore(capsys, write(tmp_path / f"{name}.jsonl", {"3.y4m": texts["3.y4m"]}), place)
        mean[name, 3] = single["native"]["m_vIoU"] * 6
    path = write(tmp_path / "answers.jsonl", answers)
    gain = rescore(capsys, path, place)["think"]
    gains = [0, 0, *(mean["pred", k] - mean["think", k] for k in (2, 3))]
    assert gains[2] > 30 and gains[3] < -30
    assert gain == pytest.approx(
        {
            **{"N": 4, "m_vIoU_think": mean["think"], "m_vIoU_pred": mean["pred"]},
            **{"gain": sum(gains) / 4, "standard_error": statistics.stdev(gains) / 2},
            **{"better": 25, "worse": 25, "equal": 50},
        }
    )
    evaluate.main(["--predictions", path, "--data", place])
    line = capsys.readouterr().out.splitlines()[-1]
    words = (
        f"of final boxes {mean['pred']:.1f}, gain {sum(gains) / 4:+.2f} +- {statistics.stdev(gains) / 2:.2f} "
    )
    assert line.startswith(f"m_vIoU (native) of thinking boxes {mean['think']:.1f}, {words}")
    assert line.endswith("of 4 answers 25.0% gain, 25.0% lose, 50.0% stay")
    single = write(tmp_path / "one.jsonl", {"2.y4m": answers["2.y4m"]})
    assert rescore(capsys, single, place)["think"]["standard_error"] is None
    evaluate.main(["--predictions", single, "--data", place])
    assert "+-" not in capsys.readouterr().out
    nothing = write(tmp_path / "none.jsonl", oracle(load_config(place, ["think=false"])))
    assert "think" not in rescore(capsys, nothing, place, "think=false")


def test_the_papers_tables(place, tmp_path, capsys, monkeypatch):
    """Of folders of finished runs (tables.py), in their rows; another folder is an error that names it."""
    for seed, score in ((0, 40.0), (1, 50.0)):
        (tmp_path / f"run{seed}").mkdir()
        save_config(load_config(place, [f"seed={seed}"]), tmp_path / f"run{seed}" / "config.yaml")
        after = {"m_tIoU": 60.0, "m_vIoU": score, "vIoU@0.3": 70.0, "vIoU@0.5": 30.0}
        (tmp_path / f"run{seed}" / "summary.json").write_text(json.dumps({"after": after}))
    evaluate.main(["--table", *(str(tmp_path / f"run{seed}") for seed in range(2))])
    (row,) = re.findall(r"RFT \+ thinking boxes *\|(.*)\|\n", capsys.readouterr().out)
    assert [cell.strip() for cell in row.split("|")][3:5] == ["45.0 ± 7.1", "44.1"]
    (tmp_path / "none").mkdir()
    assert f"{tmp_path}/none: is no finished run" in error_of(["--table", f"{tmp_path}/none"], monkeypatch)


# ----------------------------------------------------------------------------------------------------------
# Decoding


def test_run_folder_reproduces_its_summary(taught, tmp_path, capsys):
    """Also after it was moved. train.py's own answers are taken; without them they are decoded, the same."""
    run = tmp_path / "moved"
    shutil.copytree(taught, run)
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["m_vIoU"] > 5  # not the trivial 0
    evaluate.main([str(run), "--json"])
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert rows["native"] == after and rows.keys() == PROTOCOLS
    assert f"the answers are in {run}/predictions.jsonl, all of them from before" in captured.err
    (run / "predictions.jsonl").rename(run / "old.jsonl")
    evaluate.main([str(run), "--json"])
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert again.pop("cost")["answers"] == 6 and again == rows and "from before" not in captured.err
    assert (run / "predictions.jsonl").read_bytes() == (run / "old.jsonl").read_bytes()
    assert rescore(capsys, str(run / "old.jsonl"), "--data", str(run / "config.yaml")) == rows


def test_notes_about_what_a_checkpoint_was_taught(taught, place, world, capsys):
    """Pixels in its pre-training, seconds and norm1000 in ours; here it is asked otherwise."""
    settings = [f"videos={world}", "think=false", "max_new_tokens=8", "eval_limit=2"]
    evaluate.main([str(taught / "checkpoint"), place, *settings, "coordinates=original", "time_unit=frame"])
    err = capsys.readouterr().err
    assert (
        "note: Qwen2.5-VL has learned coordinates: resized in its pre-training, and is asked for orig" in err
    )
    assert "was trained with time_unit: second, and is asked with frame\n" in err
    assert "was trained with coordinates: norm1000, and is asked with original\n" in err
    assert "was trained with think" not in err and "2 do not parse, 2 of them cut off at max_new" in err


def test_a_run_whose_settings_cannot_be_read(taught, place, tmp_path, capsys, world):
    """Of an older version, say: the checkpoint is evaluated all the same."""
    run = tmp_path / "old"
    shutil.copytree(taught, run)
    (run / "config.yaml").write_text("group_size: 8\n")
    evaluate.main(
        [str(run / "checkpoint"), place, f"videos={world}", "think=false", "eval_limit=1", "--json"]
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["native"]["N"] == 1
    note = f"note: what {run}/checkpoint was trained with is not known: {run}/config.yaml: unknown key group_"
    assert note in captured.err


PLUGIN = "def first_step(answer, truth):\n    return answer.span[0] + 0.5\n"


def test_rewards_of_ones_own(taught, tmp_path, capsys, monkeypatch):
    """A run whose configuration names one, relative to where it was started; a file that has changed since
    makes other rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["rewards"]["mine.py:first_step"] = 0.25
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    answers = run / "predictions_of_best.jsonl"
    (run / "checkpoint").rename(run / "best")
    evaluate.main([str(run / "best")])
    parsed = [record for record in read(answers) if record["span"]]
    assert parsed
    for record in parsed:
        rewards = record["rewards"]
        assert rewards["mine.py:first_step"] == record["span"][0] + 0.5
        names = ("format", "consistency", "temporal", "spatial_pred")
        paper = sum(rewards[name] for name in names)
        assert rewards["total"] == pytest.approx(paper + 0.25 * rewards["mine.py:first_step"])
    evaluate.main([str(run / "best")])
    assert "all of them from before" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(PLUGIN + "# another\n")
    load_file.cache_clear()  # as in another process
    evaluate.main([str(run / "best")])
    assert f"the answers are in {run}/predictions_of_best.2.jsonl\n" in capsys.readouterr().err


def test_what_a_video_takes(decoding, taught, tmp_path, capsys):
    """Tokens are those of the answers, ends included; only what was decoded now counts."""
    began = time.perf_counter()
    evaluate.main([*decoding, "eval_limit=3", "--json"])
    wall = time.perf_counter() - began
    captured = capsys.readouterr()
    cost = json.loads(captured.out)["cost"]
    records = read(tmp_path / "run_run" / "predictions.jsonl")
    tokenizer = load_policy(str(taught / "checkpoint")).tokenizer
    tokens = [len(tokenizer(r["completion"])["input_ids"]) + (not r["truncated"]) for r in records]
    assert [record["length"] for record in records] == tokens and min(tokens) > 0
    assert (cost["answers"], cost["batch"], cost["tokens"]) == (3, 2, pytest.approx(sum(tokens) / 3))
    assert 0 < cost["seconds"] < wall / 3 and 0.1 < cost["peak_memory"] < 100
    (line,) = re.findall(
        r"per video: (\S+) s, (\d+) tokens, 2 at a time; peak (\S+) GB \(3 dec", captured.err
    )
    assert [float(word) for word in line] == pytest.approx(
        [cost[key] for key in ("seconds", "tokens", "peak_memory")], rel=0.01, abs=0.5
    )
    for count in (1, 0):
        evaluate.main([*decoding, "eval_limit=4", "--json"])
        captured = capsys.readouterr()
        cost = json.loads(captured.out).get("cost", {"answers": 0})
        assert cost["answers"] == count == captured.err.count("per video: ")


def test_cost_of_what_was_decoded():
    """10 answers in 25 s; of videos that could not be read no second is told."""
    cost = evaluate.cost_of(evaluate.Spent(25.0, 10, 600), 8)
    assert (cost["answers"], cost["seconds"], cost["tokens"], cost["batch"]) == (10, 2.5, 60, 8)
    assert evaluate.cost_of(evaluate.Spent(2.0, 3, 60), 8)["batch"] == 3  # there were no more
    assert evaluate.cost_of(evaluate.Spent(25.0, 0, 0), 8) is None


def test_checkpoint_with_a_config(taught, place, tmp_path, capsys, world):
    """Any batch size gives the same answers; --output says where they go; the table shows N and failures."""
    settings = [f"videos={world}", "think=false", "max_new_tokens=72", "eval_limit=3"]
    texts = []
    for batch in (1, 3):
        output = tmp_path / f"new{batch}" / "answers.jsonl"
        arguments = [str(taught / "checkpoint"), place, *settings, f"eval_batch={batch}"]
        evaluate.main([*arguments, "--output", str(output)])
        table = capsys.readouterr().out.splitlines()
        texts.append(output.read_text())
        assert table[0].split() == [*SCORES, "N", "failed", "best", "tIoU", "best", "vIoU"]
        assert [line.split()[0] for line in table[1:]] == ["native", "stcat", "tubedetr"]
        assert table[1].split()[5] == "3"
    assert texts[0] == texts[1]
    first = json.loads(texts[0].splitlines()[0])
    assert first["id"] == "0.y4m" and {"completion", "rewards", "truncated", "scale"} <= first.keys()
    assert same_answers(output, taught / "predictions.jsonl", 3)


def test_folders_that_cannot_be_evaluated(place, tmp_path, monkeypatch, world):
    assert "videos missing" in error_of([str(tmp_path), place], monkeypatch)
    message = error_of([str(tmp_path / "none"), place, f"videos={world}"], monkeypatch)
    assert "neither a checkpoint folder" in message and not list(tmp_path.glob("run*"))


def test_a_checkpoint_inside_a_run_uses_its_settings_and_folder(taught, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    (run / "checkpoint").rename(run / "checkpoint_50")
    evaluate.main([str(run / "checkpoint_50"), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["native"] == json.loads((run / "summary.json").read_text())["after"]
    assert f"the answers are in {run}/predictions_of_checkpoint_50.jsonl" in captured.err
    assert same_answers(run / "predictions_of_checkpoint_50.jsonl", run / "predictions.jsonl")


def test_a_checkpoint_with_a_config_leaves_the_run_of_that_config_alone(
    taught, place, tmp_path, capsys, world
):
    """The folder beside output_dir is named after both; what other settings answered is left as it is."""
    settings = [f"videos={world}", "think=false", "eval_limit=1"]
    for name, seed in (("predictions.jsonl", 0), ("predictions.2.jsonl", 1)):
        evaluate.main([str(taught / "checkpoint"), place, *settings, f"seed={seed}"])
        assert f"the answers are in {tmp_path}/run_run/{name}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run_run"]


def test_a_toy_world_is_made_first(taught, place, tmp_path, capsys, monkeypatch):
    """As train.py makes it: for decoding, and for saved answers."""
    monkeypatch.setattr(toy_world, "SPLITS", {"test": (2, 3)})  # fewer clips
    for name in ("a", "b"):
        world = tmp_path / name
        settings = ["toy=true", f"videos={world}", f"eval_annotations={world}/test.json", "think=false"]
        settings.append(f"train_annotations={world}/train.json")
        if name == "a":
            evaluate.main([str(taught / "checkpoint"), place, *settings, "--json"])
            row = json.loads(capsys.readouterr().out)["native"]
            predictions = str(tmp_path / "run_run" / "predictions.jsonl")
        else:
            assert rescore(capsys, predictions, place, *settings)["native"] == row
        assert row["N"] == 2 and (world / "test" / "0001.y4m").is_file()


def test_answers_that_cannot_be_written(taught, place, tmp_path, capsys, monkeypatch, world, full_disk):
    """Where that can be known it is said before the first answer."""
    (tmp_path / "file").write_text("")
    arguments = [str(taught / "checkpoint"), place, f"videos={world}", "eval_limit=1", "--output"]
    for output, named, reason in (
        (tmp_path, tmp_path, "Is a directory"),
        (tmp_path / "file" / "a", tmp_path / "file", "File exists"),
        (tmp_path / "file" / "b" / "a", tmp_path / "file" / "b", "Not a directory"),
    ):
        message = error_of([*arguments, str(output)], monkeypatch)
        assert message == (
            f"error: {named}: {reason}; free some space, or choose another place with --output"
        )
        assert "evaluate " not in capsys.readouterr().err  # the bar of decoding
    with full_disk():
        message = error_of([*arguments, str(tmp_path / "answers")], monkeypatch)
    assert message.startswith(
        f"error: {tmp_path}/answers.rank0: No space left on device; free some space, or"
    )
    assert (tmp_path / "answers.rank0").read_text() == "" and not (tmp_path / "answers").exists()


# ----------------------------------------------------------------------------------------------------------
# Stopped and started again, on many ranks, with videos that cannot be read


@pytest.fixture
def decoding(taught, place, world):
    """Arguments that decode six sentences with the taught checkpoint."""
    settings = [f"videos={world}", "think=false", "max_new_tokens=72", "eval_batch=2"]
    return [str(taught / "checkpoint"), place, *settings]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_answered_is_not_decoded_again(decoding, tmp_path, capsys):
    output = tmp_path / "run_run" / "predictions.jsonl"
    evaluate.main([*decoding, "eval_limit=4"])
    records = read(output)
    assert len(records) == 4
    records[1]["completion"] = "edited"
    evaluate.write_jsonl(records, output)
    capsys.readouterr()
    evaluate.main([*decoding, "--json"])
    captured = capsys.readouterr()
    assert "4 answers are in" in captured.err and json.loads(captured.out)["native"]["N"] == 6
    assert read(output)[:4] == records and [r["id"] for r in read(output)] == [f"{n}.y4m" for n in range(6)]
    before = output.read_bytes()
    evaluate.main(decoding)
    assert f"the answers are in {output}, all of them from before" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_killed_evaluation_goes_on(decoding, tmp_path, capsys):
    """What two ranks have left behind, the last line of one of them cut."""
    evaluate.main(decoding)
    output = tmp_path / "run_run" / "predictions.jsonl"
    whole, lines = output.read_bytes(), output.read_bytes().splitlines(keepends=True)
    output.unlink()
    parts = [output.with_name(f"predictions.rank{rank}.jsonl") for rank in (0, 3)]
    parts[0].write_bytes(lines[0] + lines[2][:50])
    parts[1].write_bytes(lines[1] + lines[3])
    capsys.readouterr()
    evaluate.main(decoding)
    assert "3 answers are in" in capsys.readouterr().err
    assert output.read_bytes() == whole and sorted(output.parent.iterdir()) == [output]


def test_answers_of_other_weights_are_left_alone(decoding, taught, tmp_path, monkeypatch):
    """Weights of the same names and lengths, one number changed in the middle; a mere copy is the same."""
    output = str(tmp_path / "mine.jsonl")
    evaluate.main([*decoding, "eval_limit=1", "--output", output])
    other = tmp_path / "other" / "checkpoint"
    shutil.copytree(taught / "checkpoint", other)
    evaluate.main([str(other), *decoding[1:], "eval_limit=2", "--output", output])
    assert len(read(tmp_path / "mine.jsonl")) == 2
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 8] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    message = error_of([str(other), *decoding[1:], "eval_limit=2", "--output", output], monkeypatch)
    assert "holds answers made in another way" in message


# ----------------------------------------------------------------------------------------------------------
# Controls


def test_shuffled_frames():
    """The same frames in another order, for each sample another; of three frames some stay as they are."""
    frames = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 2, 2, 3)
    orders = [controls.shuffled(frames, 5, number)[:, 0, 0, 0].tolist() for number in range(20)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 20 and list(range(12)) not in orders
    assert (
        controls.shuffled(frames, 5, 3)[:, 1, 1, 2].tolist() == orders[3]
    )  # whole frames, and again the same
    assert controls.shuffled(frames, 6, 3)[:, 0, 0, 0].tolist() != orders[3]
    assert frames[:, 0, 0, 0].tolist() == list(range(12))


def test_frames_of_another_clip_are_fitted():
    """In time and in size; of the same shape nothing is done to them."""
    frames = torch.randint(0, 256, (7, 28, 28, 3), dtype=torch.uint8)
    assert torch.equal(controls.fitted(frames, frames.shape), frames)
    fitted = controls.fitted(frames, torch.Size((4, 28, 28, 3)))
    assert torch.equal(fitted, frames[[0, 2, 4, 6]])
    assert torch.equal(controls.fitted(frames[:1], torch.Size((2, 28, 28, 3))), frames[[0, 0]])
    plain = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 28, 28, 3)
    assert torch.equal(
        controls.fitted(plain, torch.Size((13, 56, 14, 3)))[::2], plain[:, :1, :1].expand(7, 56, 14, 3)
    )
    for count in (1, 2, 40, 1000):
        many = torch.arange(count)[:, None, None, None].expand(count, 1, 1, 3)
        assert torch.equal(controls.fitted(many, many.shape), many)


def test_another_video_is_another(place):
    """The next one, round and round: also where several sentences are about one."""
    config = load_config(place)
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos)
    assert [controls.other_sample(samples, n).id for n in range(6)] == [
        f"{(n + 1) % 6}.y4m" for n in range(6)
    ]
    video = [0, 0, 1, 1, 1, 0]
    shared = [dataclasses.replace(s, video=f"{v}.mp4") for s, v in zip(samples, video, strict=True)]
    others = [controls.other_sample(shared, n) for n in range(6)]
    assert [shared.index(other) for other in others] == [2, 2, 5, 5, 5, 2]
    with pytest.raises(evaluate.DataError, match=r"the split has no other video than 0\.mp4; use"):
        controls.other_sample(shared[:2], 0)


def test_controls_depend_on_the_sample_alone(place, world):
    """Whichever samples are asked for, in whatever order, as on another rank; and sentence, truth, number and
    size of the frames stay."""
    config = load_config(place, [f"videos={world}"])
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos)
    with contextlib.closing(open_loader(config, 28)) as clips:
        real = [clips.frames(sample) for sample in samples]
        kept = [frames.clone() for frames in real]
        for control in controls.CONTROLS:
            whole = controls.Controlled(clips, control, samples, config.seed)
            whole.prefetch(samples)
            shown = [whole.frames(sample) for sample in samples]
            part = controls.Controlled(clips, control, samples, config.seed)
            part.prefetch(samples[5:2:-2])
            for number in (5, 3):
                assert torch.equal(part.frames(samples[number]), shown[number])
            for number, frames in enumerate(shown):
                assert frames.shape == real[number].shape and frames.dtype == torch.uint8
                if control == "blank":
                    assert (frames == 128).all()
                elif control == "other":
                    assert torch.equal(frames, real[(number + 1) % 6])
                else:
                    order = [int((real[number] == frame).flatten(1).all(1).nonzero()[0]) for frame in frames]
                    assert len(frames) == 12 and order != sorted(order)
                    lists = (sorted(clip.flatten(1).tolist()) for clip in (frames, real[number]))
                    assert np.array_equal(*lists)
        assert all(map(torch.equal, real, kept))  # they are shared


def test_controls_from_the_command_line(decoding, tmp_path, world, capsys):
    """`other` and `blank` say what a plain evaluation says of files that were swapped, or are grey. Their
    answers go to files of their own; what was asked, and the truth, are as ever."""
    evaluate.main(decoding)
    folder = tmp_path / "run_run"
    real = read(folder / "predictions.jsonl")
    for control in controls.CONTROLS:
        capsys.readouterr()
        evaluate.main([*decoding, "--control", control])
        captured = capsys.readouterr()
        assert captured.out.startswith(f"control: {control}: the model was shown ")
        assert f"the answers are in {folder}/predictions_{control}.jsonl" in captured.err
        answers = read(folder / f"predictions_{control}.jsonl")
        for name in ("id", "sentence", "truth", "scale", "think"):
            assert [r[name] for r in answers] == [r[name] for r in real]
        assert [r["completion"] for r in answers] != [r["completion"] for r in real]
        assert {r["fingerprint"] for r in answers}.isdisjoint(r["fingerprint"] for r in real)
    swapped, grey = tmp_path / "swapped", tmp_path / "grey"
    for made in (swapped, grey):
        made.mkdir()
        shutil.copy(world / "all.json", made)
        for n in range(6):
            if made == swapped:
                shutil.copy(world / f"{(n + 1) % 6}.y4m", made / f"{n}.y4m")
            else:
                toy_world.write_y4m(
                    made / f"{n}.y4m", np.full((24, 56, 56, 3), 128, np.uint8), toy_world.NATIVE_FPS
                )
    for made, control in ((swapped, "other"), (grey, "blank")):
        output = tmp_path / f"{control}.jsonl"
        evaluate.main([*decoding, f"videos={made}", "--output", str(output)])
        completions = [record["completion"] for record in read(output)]
        assert completions == [r["completion"] for r in read(folder / f"predictions_{control}.jsonl")]


def test_a_control_goes_on(decoding, tmp_path, capsys, monkeypatch):
    """From a part of the split to all of it, each shown what it would have been; and a file of answers with
    another control, or none, is not taken."""
    output = tmp_path / "a.jsonl"
    evaluate.main([*decoding, "--control", "other", "--output", str(output)])
    whole = output.read_bytes()
    output.unlink()
    evaluate.main([*decoding, "--control", "other", "--output", str(output), "eval_limit=1"])
    capsys.readouterr()
    evaluate.main([*decoding, "--control", "other", "--output", str(output), "--json"])
    captured = capsys.readouterr()
    assert "1 answers are in" in captured.err and json.loads(captured.out)["control"] == "other"
    assert output.read_bytes() == whole
    for other in (["--control", "blank"], []):
        message = error_of([*decoding, *other, "--output", str(output)], monkeypatch)
        assert "a.jsonl: holds answers made in another way" in message


def test_a_control_without_what_it_needs(decoding, tmp_path, world, monkeypatch):
    """A split with one video has no other one; the other video may be missing, also beyond eval_limit."""
    folder = tmp_path / "few"
    folder.mkdir()
    records = json.loads((world / "all.json").read_text())
    shutil.copy(world / "0.y4m", folder)
    arguments = [*decoding, f"videos={folder}", f"eval_annotations={folder}/all.json", "--control", "other"]
    (folder / "all.json").write_text(json.dumps({"0.y4m": records["0.y4m"]}))
    message = error_of(arguments, monkeypatch)
    assert (
        f"--control other: the split has no other video than {folder}/0.y4m; use --control blank" in message
    )
    (folder / "all.json").write_text(json.dumps({f"{n}.y4m": records[f"{n}.y4m"] for n in range(2)}))
    assert "1 of 2 videos missing: 1.y4m" in error_of([*arguments, "eval_limit=1"], monkeypatch)
    output = tmp_path / "skip.jsonl"
    evaluate.main([*arguments, "eval_limit=1", "on_bad_video=skip", "--output", str(output)])
    assert [record["completion"] for record in read(output) if record["unreadable"]] == [""]


def test_controls_of_a_run(taught, tmp_path, capsys):
    """Of its end and of a checkpoint from along the way, beside its own answers, which stay."""
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    shutil.copytree(run / "checkpoint", run / "checkpoint_20")
    before = (run / "predictions.jsonl").read_bytes()
    for place, name in (
        (run, "predictions_blank"),
        (run / "checkpoint_20", "predictions_of_checkpoint_20_blank"),
    ):
        evaluate.main([str(place), "--control", "blank", "--json"])
        captured = capsys.readouterr()
        assert f"the answers are in {run}/{name}.jsonl" in captured.err
        assert json.loads(captured.out).keys() == {*PROTOCOLS, "cost", "control"}
    assert same_answers(run / f"{name}.jsonl", run / "predictions_blank.jsonl")
    assert (run / "predictions.jsonl").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------
# Other settings, many ranks, videos that cannot be read


def test_answers_of_other_settings_are_left_alone(decoding, tmp_path, monkeypatch):
    output = str(tmp_path / "mine.jsonl")
    evaluate.main([*decoding, "eval_limit=1", "--output", output])
    evaluate.main([*decoding, "eval_limit=2", "threads=2", "--output", output])  # no answer depends on these
    assert len(read(tmp_path / "mine.jsonl")) == 2
    for setting in ("max_new_tokens=71", "seed=1", "fps=1", "coordinates=original", "eval_temperature=0.5"):
        message = error_of([*decoding, setting, "--output", output], monkeypatch)
        assert "mine.jsonl: holds answers made in another way; choose another --output" in message


def test_each_sentence_has_its_own_random_numbers(decoding, tmp_path, world):
    """The same question twice; greedily the same answer, at temperature 3 another."""
    folder = tmp_path / "twice"
    folder.mkdir()
    record = json.loads((world / "all.json").read_text())["0.y4m"]
    for name in ("a.y4m", "b.y4m"):
        shutil.copy(world / "0.y4m", folder / name)
    (folder / "all.json").write_text(json.dumps({"a.y4m": record, "b.y4m": record}))
    arguments = [*decoding, f"videos={folder}", f"eval_annotations={folder}/all.json"]
    for temperature, count in ((0, 1), (3, 2)):
        output = tmp_path / f"{temperature}.jsonl"
        evaluate.main([*arguments, f"eval_temperature={temperature}", "--output", str(output)])
        assert len({answer["completion"] for answer in read(output)}) == count


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_answers(decoding, tmp_path, ranks):
    """Sampled, so that the random numbers count as well; three ranks also share five sentences unevenly."""
    arguments = [*decoding, "eval_temperature=1", "eval_limit=5", "--json", "--output"]
    outputs = [tmp_path / name / "answers.jsonl" for name in ("one", "many")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    scores, costs = [], []
    for command, output in zip(([sys.executable], torchrun), outputs, strict=True):
        command = [*command, str(ROOT / "evaluate.py"), *arguments, str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        scores.append(json.loads(done.stdout))
        costs.append(scores[-1].pop("cost"))
        assert done.stderr.count("5 sentences") <= 1 and done.stderr.count("annotations: ") == 1
        share = 5 if output is outputs[0] else -(-5 // ranks)  # of the first rank, which shows its bar
        assert f" {share}/{share} [" in done.stderr
    assert scores[0] == scores[1] and outputs[0].read_bytes() == outputs[1].read_bytes()
    lengths = [record["length"] for record in read(outputs[0])]
    for cost, batch in zip(costs, (2, min(2, share)), strict=True):
        assert (cost["answers"], cost["batch"]) == (5, batch)
        assert cost["tokens"] == pytest.approx(statistics.mean(lengths))
        assert 0 < cost["seconds"] < 60 and cost["peak_memory"] > 0.1
    assert len({record["completion"] for record in read(outputs[0])}) > 1
    assert [path.name for path in outputs[1].parent.iterdir()] == ["answers.jsonl"]


def test_videos_that_cannot_be_read(decoding, tmp_path, world, monkeypatch, capsys):
    """Skipped: their sentences stay in the mean as failures. Otherwise: an error before or at the file."""
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "1.y4m").write_bytes(b"no video")
    arguments = [word if "videos=" not in word else f"videos={broken}" for word in decoding]
    assert "1.y4m: 8 bytes that cannot be opened" in error_of(arguments, monkeypatch)
    (broken / "4.y4m").unlink()
    assert "1 of 6 videos missing: 4.y4m" in error_of(arguments, monkeypatch)
    capsys.readouterr()
    evaluate.main([*arguments, "on_bad_video=skip", "--json", "--output", str(tmp_path / "skip.jsonl")])
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    row = scores["native"]
    assert row["N"] == 6 and row["failures"] >= 2 and scores["cost"]["answers"] == 4
    assert captured.err.count("skipped: ") == 2 and "2 of them are empty, since their videos" in captured.err
    records = {record["id"]: record for record in read(tmp_path / "skip.jsonl")}
    assert [i for i, r in records.items() if r.get("unreadable")] == ["1.y4m", "4.y4m"]
    (broken / "4.y4m").write_bytes((world / "4.y4m").read_bytes())  # found again: asked again
    evaluate.main([*arguments, "on_bad_video=skip", "--output", str(tmp_path / "skip.jsonl")])
    assert "4 answers are in" in capsys.readouterr().err
    assert [r["id"] for r in read(tmp_path / "skip.jsonl") if r.get("unreadable")] == ["1.y4m"]
    evaluate.main([*decoding, "--output", str(tmp_path / "all.jsonl")])
    for record in read(tmp_path / "all.jsonl"):
        if record["id"] not in ("1.y4m", "4.y4m"):
            assert records[record["id"]]["completion"] == record["completion"]


def test_answers_to_other_questions_are_never_taken(decoding, tmp_path, world):
    """The same file, the same ids, but sentences or truths have changed since."""
    path = tmp_path / "ann.json"
    records = json.loads((world / "all.json").read_text())
    arguments = [*decoding, f"eval_annotations={path}", "eval_limit=2"]
    for sentence in ("it moves", "it rests"):
        records["1.y4m"]["caption"] = sentence
        path.write_text(json.dumps(records))
        evaluate.main(arguments)
    files = sorted((tmp_path / "run_run").iterdir())
    assert [file.name for file in files] == ["predictions.2.jsonl", "predictions.jsonl"]
    assert [read(file)[1]["sentence"] for file in files] == ["it rests", "it moves"]


def test_killed_before_the_answers_were_put_together(decoding, tmp_path, capsys):
    evaluate.main(decoding)
    output = tmp_path / "run_run" / "predictions.jsonl"
    whole = output.read_bytes()
    output.rename(output.with_name("predictions.rank1.jsonl"))
    evaluate.main(decoding)
    assert "all of them from before" in capsys.readouterr().err
    assert output.read_bytes() == whole and list(output.parent.iterdir()) == [output]


def test_ranks_print_saved_answers_once(place, tmp_path):
    path = write(tmp_path / "oracle.jsonl", oracle(load_config(place)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "evaluate.py"), "--predictions", path, "--data", place, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["native"]["N"] == 6 and done.stderr.count("6 sentences") == 1


def test_answers_to_dropped_sentences_are_left_out(tmp_path, write_config, capsys):
    """Whoever asked a chat model all of VidSTG's sentences has answers to those without boxes, too."""
    box = {"tid": 0, "bbox": {"xmin": 5, "ymin": 5, "xmax": 25, "ymax": 30}}
    film = {"width": 56, "height": 56, "video_path": "0.y4m", "trajectories": [[box]] * 48}
    says = [{"description": f"sentence {k}", "type": "object", "target_id": k} for k in range(2)]
    record = {
        **{"vid": "0", "fps": 8, "frame_count": 48, "width": 56, "height": 56, "captions": says},
        **{"used_segment": {"begin_fid": 0, "end_fid": 47}, "temporal_gt": {"begin_fid": 8, "end_fid": 32}},
        "questions": says[:1],
    }
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "0.json").write_text(json.dumps(film))
    (tmp_path / "val.json").write_text(json.dumps([record]))
    place = write_config(
        tmp_path, dataset="vidstg", vidor=f"{tmp_path}/vidor", eval_annotations=f"{tmp_path}/val.json"
    )
    answers = dict.fromkeys(("0/captions/0", "0/captions/1", "0/questions/0"), "x")
    evaluate.main(["--predictions", write(tmp_path / "a.jsonl", answers), "--data", place, "--json"])
    captured = capsys.readouterr()
    row = json.loads(captured.out)["stcat"]
    assert (row["N"], row["declarative"]["N"], row["interrogative"]["failures"]) == (2, 1, 1)
    assert "1 answers are to sentences that were dropped: left out" in captured.err


def test_answers_of_closed_models(place, tmp_path, capsys):
    """The truth in the form of Fig. 8, second by second: the ceiling."""
    csv = ["answer_format=csv", "coordinates=relative", "time_unit=second", "think=false"]
    config = load_config(place, csv)
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos)
    answers = {}
    for sample in samples:
        truth = sample.truth(1.0)
        rows = [f"{truth.span[0]} - {truth.span[1]}", "timestamp, x1, y1, x2, y2"]
        rows += [", ".join(map(str, (step, *box))) for step, box in truth.boxes.items()]
        answers[sample.id] = "\n".join(rows)
    path = write(tmp_path / "csv.jsonl", answers)
    row = rescore(capsys, path, "--data", place, *csv)["native"]
    assert row["failures"] == 0 and row["m_tIoU"] == row["ceiling_m_tIoU"]
    assert row["m_vIoU"] == pytest.approx(row["ceiling_m_vIoU"], abs=0.5)
    assert rescore(capsys, path, "--data", place)["native"]["failures"] == 6


def test_csv_in_pixels_is_noticed(place, tmp_path, capsys):
    """Clamped to the frame it scores 0 like a bad model; that it is another unit must be said."""
    csv = ["answer_format=csv", "coordinates=relative", "think=false"]
    path = write(
        tmp_path / "csv.jsonl", {"0.y4m": "1 - 2\n1, 10, 10, 40, 40", "1.y4m": "1 - 2\n1, 0, 0, 1.1, 1"}
    )
    evaluate.main(["--predictions", path, "--data", place, *csv])
    assert "1 answers have coordinates above 1, which are taken for 1\n" in capsys.readouterr().err


def test_an_open_model_is_asked_for_csv(decoding, tmp_path, capsys):
    csv = [
        "answer_format=csv",
        "coordinates=relative",
        "eval_limit=1",
        "--output",
        str(tmp_path / "csv.jsonl"),
    ]
    evaluate.main([*decoding, *csv])
    (record,) = read(tmp_path / "csv.jsonl")
    assert "rewards" not in record and record["scale"] == [1, 1]


def test_answers_of_another_fingerprint_are_asked_for_again(tmp_path, monkeypatch, write_config):
    config = load_config(write_config(tmp_path))
    samples, output = (
        evaluate.load_split(config, config.eval_annotations)[0][:2],
        tmp_path / "predictions_1.jsonl",
    )
    old = [{"id": s.id, "completion": "old", "fingerprint": "theirs"} for s in samples]
    evaluate.write_jsonl(old, output)

    def decode(policy, todo, *_):
        yield [{"id": sample.id, "completion": "new"} for _, sample in todo]

    monkeypatch.setattr(evaluate, "decode", decode)
    records = evaluate.decode_split(None, samples, None, config, output, "ours")
    assert [r["completion"] for r in records] == ["new", "new"]
    assert [json.loads(line) for line in output.read_text().splitlines()] == records
