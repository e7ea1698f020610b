"""evaluate.py: from saved answers, checkpoints and runs to the paper's row; resumed, on many ranks."""

import contextlib
import dataclasses
import io
import json
import shutil
import statistics
import time

import pytest
import yaml
from ranks import on_ranks

import evaluate
from config import load_config
from data import load_samples
from metrics import PROTOCOLS, whole_step_scores
from prompts import Answer, format_answer, parse_answer, truth_answer
from qwen.checkpoint import load_policy
from runtime.files import UserError, write_jsonl
from runtime.plugins import FUNCTIONS, read_source
from runtime.predictions import fingerprint_of
from video.frames import VideoError

SCORES = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")


@pytest.fixture
def place(tmp_path, write_config):
    """A configuration whose videos and model do not exist: scoring saved answers needs neither."""
    return write_config(tmp_path, videos=str(tmp_path / "gone"), model=str(tmp_path / "none"))


@pytest.fixture
def decoding(taught, place, world):
    """Arguments that decode six sentences with the taught checkpoint."""
    settings = [f"videos={world}", "think=false", "max_new_tokens=72", "eval_batch=2"]
    return [str(taught / "checkpoint"), place, *settings]


def oracle(config, scale=(1000, 1000)):
    """The truth as answers: id -> completion."""
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos)
    truths = {s.id: s.truth(config.text_format.step_seconds) for s in samples}
    return {i: format_answer(truth_answer(truth, scale, config.think)) for i, truth in truths.items()}


def write(path, completions, **more):
    write_jsonl([{"id": i, "completion": c, **more} for i, c in completions.items()], path)
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rescore(capsys, path, *arguments):
    """The one JSON object on stdout."""
    evaluate.main(["--predictions", path, "--data", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def decode(capsys, arguments, *more):
    """(scores, stderr) of an evaluation that decodes."""
    evaluate.main([*arguments, *map(str, more), "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_oracle_reaches_the_ceiling(place, tmp_path, capsys):
    config = load_config(place)
    rows = rescore(capsys, write(tmp_path / "oracle.jsonl", oracle(config)), place)
    assert rows.pop("think")["gain"] == 0 and rows.keys() == PROTOCOLS.keys()
    samples, _ = load_samples("hcstvg", config.eval_annotations, config.videos)
    for protocol, best in whole_step_scores(samples, config.text_format)["best"].items():
        ceiling = {"ceiling_m_tIoU": best["m_tIoU"], "ceiling_m_vIoU": best["m_vIoU"]}
        rows[protocol].pop("m_vIoU_common", None)
        assert rows[protocol] == best | ceiling
    assert rows["native"]["m_tIoU"] == pytest.approx(100)  # toy events fill whole seconds
    # Boxes are interpolated between seconds and held in the last one; 1/8 of a second's way is lost at most.
    assert rows["native"]["m_vIoU"] > 75 and rows["native"]["vIoU@0.5"] == 100
    assert (rows["native"]["N"], rows["native"]["failures"]) == (6, 0)


@pytest.mark.parametrize(
    "changes", [{"think": False}, {"time_unit": "frame", "fps": 4}, {"coordinates": "original"}]
)
def test_answers_are_read_as_the_config_says(place, tmp_path, capsys, changes):
    """At 4 steps a second each native frame has its box. The settings may also stand in a second file."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = load_config(place, overrides)
    scale = (56, 56) if config.coordinates == "original" else (1000, 1000)
    path = write(tmp_path / "oracle.jsonl", oracle(config, scale))
    rows = rescore(capsys, path, place, *overrides)
    row = rows["native"]
    assert row["m_tIoU"] == pytest.approx(100) and row["failures"] == 0
    assert row["m_vIoU"] > (99 if "fps" in changes else 75)
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(changes))
    assert rescore(capsys, path, place, str(tmp_path / "more.yaml")) == rows
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
    row = rescore(capsys, str(tmp_path / "b.jsonl"), place, "eval_limit=2")["native"]
    assert (row["N"], row["failures"]) == (2, 2)  # answers beyond the limit are left out
    nothing = rescore(capsys, write(tmp_path / "c.jsonl", {}), place)["native"]
    assert [nothing[key] for key in (*SCORES, "N", "failures")] == [0, 0, 0, 0, 6, 6]


def test_resized_needs_the_size_that_the_model_saw(place, tmp_path, capsys):
    answers = oracle(load_config(place, ["coordinates=resized"]), (28, 56))
    good = write(tmp_path / "good.jsonl", answers, scale=[28, 56])
    row = rescore(capsys, good, place, "coordinates=resized")["native"]
    assert row["failures"] == 0 and row["vIoU@0.5"] == 100
    for more in ({}, {"scale": 5}, {"scale": [0, 56]}, {"scale": ["28", "56"]}):
        bad = write(tmp_path / "bad.jsonl", answers, **more)
        with pytest.raises(UserError, match='"scale"'):
            rescore(capsys, bad, place, "coordinates=resized")


LINE = '{"id": "0.y4m", "completion": "x"}\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LINE + LINE, "line 2.*line 1"),
        (LINE.replace("0.y4m", "9.y4m"), "9.y4m.*no such sentence"),
        (LINE + '{"id": "1.y4m"}\n', "line 2"),
        (LINE + '{"id": "1.y4m", "completion": null}\n', "line 2.*texts"),
        (LINE + '{"id": "1.y4m", "comple', "line 2"),  # an answer that was cut is not left out
    ],
)
def test_bad_predictions(place, tmp_path, text, named):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=named):
        evaluate.main(["--predictions", str(tmp_path / "bad.jsonl"), "--data", place])


def test_command_line(place, tmp_path, capfd):
    """One JSON object and nothing else on stdout, down to the file descriptor; else a table."""
    path = write(tmp_path / "oracle.jsonl", oracle(load_config(place)))
    evaluate.main(["--predictions", path, "--data", place, "fps=4", "--json"])
    assert json.loads(capfd.readouterr().out)["native"]["m_tIoU"] == pytest.approx(100)
    evaluate.main(["seed=1", "--predictions", path, "--data", place])
    table = capfd.readouterr().out.splitlines()
    assert table[0].split()[:6] == [*SCORES, "N", "failed"]
    assert [line.split()[0] for line in table[1:6]] == list(PROTOCOLS)
    saved, data = f"--predictions {path}", f"--data {place}"
    both = f"{saved} {data}"
    for wrong in ("", saved, data, f"{saved} --data seed=1", f"{tmp_path} {both}", f"{both} --output y"):
        with pytest.raises(SystemExit, match="2"):  # argparse's, with the usage
            evaluate.main(wrong.split())


def test_what_final_boxes_gain(place, tmp_path, capsys):
    """Of six answers one gains, one loses, two stay, one does not parse, one is missing. The mean of the
    thinking boxes is the row of the same answers with these boxes in the place of the final ones."""
    truths = {key: parse_answer(text) for key, text in oracle(load_config(place)).items()}

    def away(answer, which):  # the boxes of one list, where nothing is
        return dataclasses.replace(answer, **{which: ((answer.start, (0, 0, 1, 1)),)})

    answers = {"0.y4m": truths["0.y4m"], "1.y4m": truths["1.y4m"]}
    answers |= {"2.y4m": away(truths["2.y4m"], "think"), "3.y4m": away(truths["3.y4m"], "pred")}
    swapped = {key: dataclasses.replace(answer, pred=answer.think) for key, answer in answers.items()}

    def viou(some, *keys):  # the sum over the sentences
        path = write(tmp_path / "some.jsonl", {key: format_answer(some[key]) for key in keys or some})
        return rescore(capsys, path, place)["native"]["m_vIoU"] * 6

    means = {"m_vIoU_think": viou(swapped) / 4, "m_vIoU_pred": viou(answers) / 4}
    gains = [0, 0, *(viou(answers, key) - viou(swapped, key) for key in ("2.y4m", "3.y4m"))]
    assert gains[2] > 30 and gains[3] < -30
    texts = {key: format_answer(answer) for key, answer in answers.items()} | {"4.y4m": "x"}
    path = write(tmp_path / "answers.jsonl", texts)
    expected = {"N": 4, **means, "gain": sum(gains) / 4, "standard_error": statistics.stdev(gains) / 2}
    expected |= {"better": 25, "worse": 25, "equal": 50}
    assert rescore(capsys, path, place)["think"] == pytest.approx(expected)
    single = write(tmp_path / "one.jsonl", {"2.y4m": texts["2.y4m"]})
    assert rescore(capsys, single, place)["think"]["standard_error"] is None
    nothing = write(tmp_path / "none.jsonl", oracle(load_config(place, ["think=false"])))
    assert "think" not in rescore(capsys, nothing, place, "think=false")


def test_answers_to_dropped_sentences_are_left_out(tmp_path, write_config, capsys):
    """Whoever asked a chat model all of VidSTG's sentences has answers to those without boxes, too."""
    size, box = {"width": 56, "height": 56}, {"bbox": {"xmin": 5, "ymin": 5, "xmax": 25, "ymax": 30}}
    film = {**size, "video_path": "0.y4m", "trajectories": [[{"tid": 0, **box}]] * 48}
    says = [{"description": f"sentence {k}", "type": "object", "target_id": k} for k in range(2)]
    record = {"vid": "0", "fps": 8, "frame_count": 48, **size, "captions": says, "questions": says[:1]}
    record["used_segment"] = {"begin_fid": 0, "end_fid": 47}
    record["temporal_gt"] = {"begin_fid": 8, "end_fid": 32}
    (tmp_path / "vidor").mkdir()
    (tmp_path / "vidor" / "0.json").write_text(json.dumps(film))
    (tmp_path / "val.json").write_text(json.dumps([record]))
    place = write_config(
        tmp_path, dataset="vidstg", vidor=f"{tmp_path}/vidor", eval_annotations=f"{tmp_path}/val.json"
    )
    answers = dict.fromkeys(("0/captions/0", "0/captions/1", "0/questions/0"), "x")
    row = rescore(capsys, write(tmp_path / "a.jsonl", answers), place)["stcat"]
    assert (row["N"], row["declarative"]["N"], row["interrogative"]["failures"]) == (2, 1, 1)


def test_run_folder_reproduces_its_summary(taught, tmp_path, capsys):
    """Also after it was moved. An earlier checkpoint's answers are decoded, and go to another file."""
    run = tmp_path / "moved"
    shutil.copytree(taught, run)
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["m_vIoU"] > 5  # not the trivial 0
    rows, err = decode(capsys, [str(run)])
    assert rows["native"] == after and rows.keys() == PROTOCOLS.keys()
    assert "6 answers are in" in err
    assert rescore(capsys, str(run / "predictions.jsonl"), str(run / "config.yaml")) == rows
    (run / "checkpoint").rename(run / "checkpoint_50")
    again, err = decode(capsys, [str(run / "checkpoint_50")])
    assert again.pop("cost")["answers"] == 6 and again == rows and "already" not in err
    assert read(run / "predictions_of_checkpoint_50.jsonl") == read(run / "predictions.jsonl")


def test_a_run_without_a_checkpoint_says_what_there_is(taught, tmp_path):
    for name in ("run/checkpoint_20", "run.1/checkpoint"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(taught / "config.yaml", tmp_path / "run")
    with pytest.raises(UserError, match=r"run has no checkpoint yet.*run\.1, .*run/checkpoint_20"):
        evaluate.main([str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"neither a run .* nor a checkpoint"):
        evaluate.main([str(tmp_path / "run.1")])


def test_notes_about_what_a_checkpoint_was_taught(taught, place, world, tmp_path, capsys):
    """Pixels in its pre-training, seconds and norm1000 in ours, which its run says; here it is asked
    otherwise."""
    settings = [f"videos={world}", "think=false", "max_new_tokens=8", "eval_limit=2"]
    evaluate.main([str(taught / "checkpoint"), place, *settings, "coordinates=original", "time_unit=frame"])
    err = capsys.readouterr().err
    assert "pre-trained" not in err and "trained with time_unit: second, and is asked with frame" in err
    assert "trained with coordinates: norm1000, and is asked with original" in err
    shutil.copytree(taught / "checkpoint", tmp_path / "away/copy")
    evaluate.main([str(tmp_path / "away/copy"), place, *settings])
    learned = "pre-trained with coordinates: resized, and asked for norm1000: unless it was trained for that"
    assert learned in capsys.readouterr().err
    assert (
        "trained with think" not in err and "0 of 2 answers parse, 2 cut off at max_new_tokens=8; one" in err
    )


def test_plugin_rewards(taught, tmp_path, capsys, monkeypatch):
    """One that the user names is run and stands in the records; of one that the run alone names only the
    text counts. A file that has changed since makes other rewards, in another file."""
    monkeypatch.chdir(tmp_path)
    plugin = "def first_step(answer, truth):\n    return answer.span[0] + 0.5\n"
    (tmp_path / "own.py").write_text(plugin)
    shutil.copytree(taught / "checkpoint", "run/best")
    settings = yaml.safe_load((taught / "config.yaml").read_text())
    settings["rewards"]["own.py:first_step"] = 0.25
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    evaluate.main(["run/best", "eval_limit=3", "rewards.own.py:first_step=0.25"])
    assert "note: not computed" not in capsys.readouterr().err
    parsed = [record for record in read(tmp_path / "run/predictions_of_best.jsonl") if record["span"]]
    assert parsed
    for record in parsed:
        rewards = record["rewards"]
        assert rewards["own.py:first_step"] == record["span"][0] + 0.5
        paper = sum(rewards[name] for name in ("format", "consistency", "temporal", "spatial_pred"))
        assert rewards["total"] == pytest.approx(paper + 0.25 * rewards["own.py:first_step"])
    (tmp_path / "own.py").write_text(plugin + "# another\n")
    read_source.cache_clear()  # as in another process
    del FUNCTIONS["own.py:first_step"]
    evaluate.main(["run/best", "eval_limit=1"])
    said = "note: not computed, as only run/config.yaml names it: own.py:first_step; to run this code, write"
    assert said in capsys.readouterr().err
    assert len([*(tmp_path / "run").glob("predictions_of_best*.jsonl")]) == 2


def test_what_a_video_takes(decoding, taught, tmp_path, capsys):
    """Tokens are those of the answers, ends included; only what was decoded now counts. No answer depends on
    the batch size."""
    began = time.perf_counter()
    scores, _ = decode(capsys, decoding, "eval_limit=3")
    wall, cost = time.perf_counter() - began, scores["cost"]
    records = read(tmp_path / "run_run" / "predictions.jsonl")
    tokenizer = load_policy(str(taught / "checkpoint")).tokenizer
    tokens = [len(tokenizer(r["completion"])["input_ids"]) + (not r["truncated"]) for r in records]
    assert [record["length"] for record in records] == tokens and min(tokens) > 0
    assert (cost["answers"], cost["batch"], cost["tokens"]) == (3, 2, pytest.approx(sum(tokens) / 3))
    assert 0 < cost["seconds"] < wall / 3 and 0.1 < cost["peak_memory"] < 100
    for count in (1, 0):
        scores, _ = decode(capsys, decoding, "eval_limit=4")
        assert scores.get("cost", {"answers": 0})["answers"] == count
    single = tmp_path / "single.jsonl"
    evaluate.main([*decoding, "eval_limit=3", "eval_batch=1", "--output", str(single)])
    assert read(single) == records and "per video: " in capsys.readouterr().out


def test_answers_that_cannot_be_written(decoding, tmp_path, full_disk, capsys):  # its output is no file
    with pytest.raises(UserError, match="Is a directory"):
        evaluate.main([*decoding, "--output", str(tmp_path)])
    with full_disk(), pytest.raises(OSError, match="too large"):
        evaluate.main([*decoding, "eval_limit=1", "--output", str(tmp_path / "answers")])
    evaluate.main([*decoding, "eval_limit=1", "--output", str(tmp_path / "answers")])  # now there is space
    assert len(read(tmp_path / "answers")) == 1 and not (tmp_path / "answers.rank0").exists()


def test_a_killed_evaluation_resumes(decoding, tmp_path, capsys):
    """From what two ranks have left, a line of one cut. Answers beyond eval_limit stay."""
    evaluate.main(decoding)
    output = tmp_path / "run_run" / "predictions.jsonl"
    whole, lines = output.read_bytes(), output.read_bytes().splitlines(keepends=True)
    output.unlink()
    parts = [output.with_name(f"predictions.rank{rank}.jsonl") for rank in (0, 3)]
    parts[0].write_bytes(lines[0] + lines[2][:50])
    parts[1].write_bytes(lines[1].replace(b'"completion": "', b'"completion": "edited') + lines[3])
    capsys.readouterr()
    _, err = decode(capsys, decoding)
    assert "3 answers are in" in err and sorted(output.parent.iterdir()) == [output]
    assert output.read_bytes().replace(b"edited", b"") == whole
    scores, _ = decode(capsys, decoding, "eval_limit=2")
    assert scores["native"]["N"] == 2 and output.read_bytes().replace(b"edited", b"") == whole


def test_answers_made_in_another_way_are_left_alone(decoding, place, world, taught, tmp_path):
    """What changes an answer changes the fingerprint, and nothing else does."""
    annotations, copied = tmp_path / "annotations.json", tmp_path / "copy" / "checkpoint"
    shutil.copy(world / "all.json", annotations)
    shutil.copytree(taught / "checkpoint", copied)

    def fingerprint(*settings, checkpoint=copied):
        config = load_config(place, [f"eval_annotations={annotations}", *settings])
        return fingerprint_of(str(checkpoint), config)

    ours = fingerprint()
    same = ["threads=2", "eval_batch=1", "eval_limit=1", "videos=elsewhere"]
    assert {fingerprint(checkpoint=taught / "checkpoint"), *map(fingerprint, same)} == {ours}
    changes = ["max_new_tokens=71", "seed=1", "fps=1", "coordinates=original", "eval_temperature=0.5"]
    others = [fingerprint(setting) for setting in changes]
    annotations.write_text(annotations.read_text().replace("moves", "rests"))
    others.append(fingerprint())
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 8] ^= 1  # one number in the middle
    (copied / "model.safetensors").write_bytes(weights)
    others.append(fingerprint())
    assert len({ours, *others}) == 1 + len(others)

    for seed in (0, 1):
        evaluate.main([*decoding, "eval_limit=1", f"seed={seed}"])
    files = sorted((tmp_path / "run_run").iterdir())
    assert [file.name == "predictions.jsonl" for file in files] == [False, True]
    assert read(files[0])[0]["fingerprint"] in files[0].name


def test_each_sentence_has_its_own_random_numbers(decoding, tmp_path, world):
    """The same question twice; greedily the same answer, at temperature 3 another."""
    record = json.loads((world / "all.json").read_text())["0.y4m"]
    for name in ("a.y4m", "b.y4m"):
        shutil.copy(world / "0.y4m", tmp_path / name)
    (tmp_path / "all.json").write_text(json.dumps({"a.y4m": record, "b.y4m": record}))
    arguments = [*decoding, f"videos={tmp_path}", f"eval_annotations={tmp_path}/all.json"]
    for temperature, count in ((0, 1), (3, 2)):
        output = tmp_path / f"{temperature}.jsonl"
        evaluate.main([*arguments, f"eval_temperature={temperature}", "--output", str(output)])
        assert len({answer["completion"] for answer in read(output)}) == count


def test_videos_that_cannot_be_read(decoding, tmp_path, world, capsys):
    """Skipped: their sentences stay in the mean as failures, and are tried again. Otherwise: an error."""
    broken, output = tmp_path / "broken", tmp_path / "skip.jsonl"
    shutil.copytree(world, broken)
    (broken / "1.y4m").write_bytes(b"no video")
    arguments = [word if "videos=" not in word else f"videos={broken}" for word in decoding]
    with pytest.raises(VideoError, match=r"1\.y4m"):
        evaluate.main(arguments)
    (broken / "4.y4m").unlink()
    with pytest.raises(UserError, match=r"1 of 6 videos missing: 4\.y4m"):
        evaluate.main(arguments)
    arguments += ["on_bad_video=skip", "--output", str(output)]
    scores, err = decode(capsys, arguments)
    row = scores["native"]
    assert row["N"] == 6 and row["failures"] >= 2 and scores["cost"]["answers"] == 4
    assert err.count("skipped: ") == 2
    assert [r["id"] for r in read(output) if r.get("unreadable")] == ["1.y4m", "4.y4m"]
    # Another rank's file from then still says so when the video is there again.
    shutil.copy(output, tmp_path / "skip.rank7.jsonl")
    shutil.copy(world / "4.y4m", broken)
    _, err = decode(capsys, arguments)
    assert "4 answers are in" in err
    assert [r["id"] for r in read(output) if r.get("unreadable")] == ["1.y4m"]
    evaluate.main([*decoding, "--output", str(tmp_path / "all.jsonl")])
    assert read(output)[4] == read(tmp_path / "all.jsonl")[4]


def evaluate_here(arguments):
    """What a rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main(arguments)
    return out.getvalue()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_answers(decoding, tmp_path, ranks):
    """Sampled, so that the random numbers count as well; three ranks also share five sentences unevenly."""
    outputs = [tmp_path / name / "answers.jsonl" for name in ("one", "many")]
    arguments = [*decoding, "eval_temperature=1", "eval_limit=5", "--json", "--output"]
    one = json.loads(evaluate_here([*arguments, str(outputs[0])]))
    first, *others = on_ranks(ranks, evaluate_here, [*arguments, str(outputs[1])])
    many = json.loads(first)
    assert set(others) == {""}  # only the first rank prints
    assert {key: many[key] for key in PROTOCOLS} == {key: one[key] for key in PROTOCOLS}
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert [*outputs[1].parent.iterdir()] == [outputs[1]]
    assert len({record["completion"] for record in read(outputs[0])}) > 1
    share = -(-5 // ranks)  # of the first rank
    assert (many["cost"]["answers"], many["cost"]["batch"]) == (5, min(2, share))
    assert many["cost"]["tokens"] == one["cost"]["tokens"]


def failing(arguments):
    with pytest.raises(FloatingPointError, match="worse"):
        evaluate.main(arguments)


def test_a_plugin_that_fails_on_one_rank_ends_all(decoding, tmp_path, monkeypatch):
    """The other rank does not wait for answers that never come."""
    monkeypatch.chdir(tmp_path)
    good = "os.environ['RANK'] == '0' or truth.span[1] > 4"  # as in all that a reward is tried on
    text = f"import os\ndef worse(answer, truth):\n    return float({good} or 'nan')\n"
    (tmp_path / "worse.py").write_text(text)
    on_ranks(2, failing, [*decoding, "rewards.worse.py:worse=1"], timeout=60)
