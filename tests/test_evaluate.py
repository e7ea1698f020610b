"""The script part of evaluate.py: saved answers, checkpoints and run folders to the paper's row."""

import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import toy
from config import load_config
from data import load_samples
from metrics import grid_ceiling
from prompts import Answer, format_answer, truth_answer

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
    assert "none.yaml: cannot be read" in error_of([str(tmp_path), str(tmp_path / "none.yaml")], monkeypatch)
    nothing = error_of(["--predictions", "x", place, "eval_annotations="], monkeypatch)
    assert (
        nothing == "error: no annotation file is named: set eval_annotations, and train_annotations to train"
    )
    nowhere = str(tmp_path / "none" / "x")
    assert f"{nowhere} is no run of train.py, nor a checkpoint in one" in error_of([nowhere], monkeypatch)
    for arguments in (
        [],
        ["--predictions", "x"],
        ["--predictions", "x", "model", place],
        ["--predictions", "x", place, "--data", place],
        ["--data", place],
        ["a", "b", "c"],
    ):
        with pytest.raises(SystemExit) as caught:
            evaluate.main(arguments)
        assert caught.value.code == 2 and "error: " in capsys.readouterr().err  # argparse's, with the usage


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
    assert json.loads(captured.out) == rows and "from before" not in captured.err
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
    monkeypatch.setattr(toy, "SPLITS", {"test": (2, 3)})  # fewer clips
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
    scores = []
    for command, output in zip(([sys.executable], torchrun), outputs, strict=True):
        command = [*command, str(ROOT / "evaluate.py"), *arguments, str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        scores.append(json.loads(done.stdout))
        assert done.stderr.count("5 sentences") <= 1 and done.stderr.count("annotations: ") == 1
        share = 5 if output is outputs[0] else -(-5 // ranks)  # of the first rank, which shows its bar
        assert f" {share}/{share} [" in done.stderr
    assert scores[0] == scores[1] and outputs[0].read_bytes() == outputs[1].read_bytes()
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
    row = json.loads(captured.out)["native"]
    assert row["N"] == 6 and row["failures"] >= 2
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
