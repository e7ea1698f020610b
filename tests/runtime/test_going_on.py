"""Runs that are killed, stopped, started beside themselves or asked for more steps: whole runs of train.py.

A kill is an exception of its own kind at a chosen call, which leaves on disk what signal 9 would leave there.
(`python tests/kill.py` sends the signal itself, at any moment.)
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sft
import torch
import yaml
from safetensors.torch import load_file

import train
from config import ConfigError
from qwen.checkpoint import load_policy
from runtime import logs, run
from runtime.files import UserError

ROOT = Path(__file__).parent.parent.parent
TIMED = ("seconds", "tokens_per_second", "peak_memory")
TOY = {"model": str(ROOT / "checkpoints/toy"), "max_new_tokens": 192, "learning_rate": 1e-4, "eval_limit": 2}
FOUR = {**TOY, "steps": 4, "kl_beta": 0.05}
SFT = {**TOY, "steps": 3, "kl_beta": 0.1, "sft": {"steps": 3, "learning_rate": 1e-4, "batch_size": 2}}
SFT |= {"save_every": 1, "keep": 1}
LORA = {**TOY, "steps": 4, "kl_beta": 0.05, "lora": {"rank": 4}, "learning_rate": 1e-3, "save_every": 1}


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "draw_pictures", lambda run: "no pictures")
        yield


class Killed(BaseException):
    """Nothing catches it."""


@contextlib.contextmanager
def at_call(module, name, number, act):
    """Within it `act` is called before the function's call of this number."""
    function, calls = getattr(module, name), itertools.count(1)

    def watched(*arguments, **keywords):
        if next(calls) == number:
            act()
        return function(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, watched)
        yield
    assert next(calls) > number, f"{name} was not called {number} times"


def killed(module, name, number, arguments):
    """train.py with these arguments, killed before a function's call of this number."""

    def die():
        raise Killed

    with at_call(module, name, number, die), pytest.raises(Killed):
        train.main(arguments)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run):
    """Without what is never twice the same."""
    lines = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def outcome(run):
    """What a run comes to, byte for byte: name -> content."""
    (weights,) = (run / "checkpoint").glob("*.safetensors")
    names = ["rollouts.jsonl", "predictions_before.jsonl", "predictions.jsonl", f"checkpoint/{weights.name}"]
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    return {
        "metrics": metrics_of(run),
        "summary": summary,
        **{name: (run / name).read_bytes() for name in names},
    }


def assert_same(run, whole):
    ours, wanted = outcome(run), outcome(whole)
    assert ours["metrics"] == wanted["metrics"]
    assert [name for name in wanted if ours.get(name) != wanted[name]] == []


def contents(place):
    """All that is in a folder: relative path -> hash, None for a folder."""
    return {
        str(path.relative_to(place)): None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
    }


def names(run):
    return {path.name for path in run.iterdir()}


def refused(arguments, place, kind=ConfigError):
    """What train.py says, in one line; neither the run's folder nor what is beside it has changed."""
    before = contents(place)
    with pytest.raises(kind) as caught:
        train.main(arguments)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert contents(place) == before
    return str(caught.value)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, write_config):
    """settings -> folder of a run that nothing happens to. To be read only."""
    runs = {}

    def run(settings):
        key = json.dumps(settings)
        if key not in runs:
            folder = tmp_path_factory.mktemp("alone")
            train.main([write_config(folder, **settings)])
            runs[key] = folder / "run"
            moved, rollouts = weights_moved(folder / "run"), read_lines(folder / "run/rollouts.jsonl")
            assert moved > 5e-5 and any(record["advantage"] for record in rollouts)
        return runs[key]

    return run


def weights_moved(run):
    """How far from the toy's checkpoint, or as adapters from nothing."""
    (path,) = (run / "checkpoint").glob("*.safetensors")
    weights = load_file(path)
    if path.name.startswith("adapter"):
        return max(value.abs().max() for name, value in weights.items() if "lora_B" in name)
    start = load_file(ROOT / "checkpoints/toy/model.safetensors")
    return max((weights[name] - start[name]).abs().max() for name in start)


@pytest.fixture
def finished(left_alone, tmp_path, write_config):
    """(configuration, folder) of a run of two steps that has ended, to go on with or to spoil."""
    settings = {**FOUR, "steps": 2}
    run = shutil.copytree(left_alone(settings), tmp_path / "place/run")
    config = write_config(tmp_path, **settings, output_dir=str(run))
    shutil.copy(config, run / "config.yaml")
    return config, run


# ----------------------------------------------------------------------------------------------------------
# More steps


@pytest.mark.parametrize("found", ["as it ended", "without its answers", "half replaced", "after a signal"])
def test_more_steps(left_alone, finished, found):
    """Killed in the first new one, and once more at the end: like a run that was asked for all of them. The
    answers of the first end stay under another name."""
    config, run = finished
    first = (run / "predictions.jsonl").read_bytes()
    if found == "without its answers":
        (run / "predictions.jsonl").unlink()
    elif found == "half replaced":
        (run / "checkpoint").rename(run / "checkpoint.old")
        shutil.copytree(run / "checkpoint.old/state", run / "checkpoint.tmp/state")
    elif found == "after a signal":  # in the second step; then it went on to its end
        shutil.copytree(run / "checkpoint", run / "checkpoint_2")
    words = [config, "steps=4", "resume=auto"]

    def first_end_is_kept():
        assert not (run / "predictions.jsonl").exists()
        kept = run / "predictions_2.jsonl"
        assert kept.read_bytes() == first if found != "without its answers" else not kept.exists()

    killed(train, "improve", 1, words)
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 4
    assert not (run / "summary.json").exists()  # which would say that it has ended
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2]
    if found != "half replaced":
        first_end_is_kept()
    killed(train, "report", 1, words)  # all is there but the summary
    train.main(words)
    assert_same(run, left_alone(FOUR))
    (run / "predictions.jsonl").unlink()
    if found != "half replaced":
        first_end_is_kept()
    assert not (run.parent / "run.1").exists()


def test_a_stop_in_the_last_step_then_more(left_alone, tmp_path, write_config):
    """A signal in the second of two steps, the end, and two steps more."""
    path, run = write_config(tmp_path, **{**FOUR, "steps": 2}), tmp_path / "run"

    def stop():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    with at_call(train, "improve", 2, stop):
        train.main([path])
    assert {"checkpoint_2"} == {name for name in names(run) if "checkpoint" in name}
    assert not (run / "predictions.jsonl").exists()
    train.main([path, "resume=auto"])
    first = (run / "predictions.jsonl").read_bytes()
    assert first == (left_alone({**FOUR, "steps": 2}) / "predictions.jsonl").read_bytes()
    train.main([path, "resume=auto", "steps=4"])
    assert_same(run, left_alone(FOUR))
    assert (run / "predictions_2.jsonl").read_bytes() == first


def test_drift_is_looked_for_in_the_last_steps_also_after_a_kill(tmp_path, write_config, monkeypatch):
    """Of reward and vIoU as they stand in the log, here of two steps."""
    path, run, seen = write_config(tmp_path, **FOUR, save_every=1), tmp_path / "run", []
    monkeypatch.setattr(train, "DRIFT_STEPS", 2)
    monkeypatch.setattr(train, "drifts_apart", lambda recent: seen.append(list(recent)) or len(seen) > 3)
    killed(train, "improve", 4, [path])
    train.main([path, "resume=auto"])
    lines = [line for line in metrics_of(run) if line["phase"] == "grpo"]
    pairs = [(line["reward"], line["viou_pred"]) for line in lines]
    assert seen == [pairs[:1], pairs[:2], pairs[1:3], pairs[2:]]
    assert [line["drift"] for line in lines] == [0, 0, 0, 1]


def test_nothing_more_to_do(finished):
    """A finished run that is started again decodes nothing, and says the same."""
    config, run = finished
    before, stamp = outcome(run), (run / "checkpoint").stat().st_mtime_ns
    train.main([config, "resume=auto"])
    assert outcome(run) == before and (run / "checkpoint").stat().st_mtime_ns == stamp
    assert not (run / "predictions_2.jsonl").exists()


def test_killed_before_its_first_checkpoint(left_alone, tmp_path, write_config):
    """It begins again, in its place; what was being written goes."""
    path, run = write_config(tmp_path, **FOUR), tmp_path / "run"
    killed(train, "improve", 3, [path])
    assert len(read_lines(run / "rollouts.jsonl")) >= 2 * 8 and len(metrics_of(run)) == 3
    for name in ("checkpoint_2.tmp/state", "best_1.tmp"):
        (run / name).mkdir(parents=True)
    train.main([path, "resume=auto"])
    assert_same(run, left_alone(FOUR))
    assert names(tmp_path) == {"config.yaml", "run"} and not list(run.glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------
# What is refused


def test_no_whole_checkpoint(finished, capsys):
    """The weights are there, the state is not: nothing to go on from, and nothing to begin over."""
    config, run = finished
    shutil.rmtree(run / "checkpoint/state")
    capsys.readouterr()
    for steps in (2, 4):
        said = refused([config, "resume=auto", f"steps={steps}"], run.parent, UserError)
        assert said == f"resume: no checkpoint in {run} is whole; put one back, or set another output_dir"
        damaged = f"{run}/checkpoint is damaged and passed over (FileNotFoundError: "
        lines = [line for line in capsys.readouterr().err.splitlines() if str(run) in line]
        assert len(lines) == 1 and lines[0].startswith(damaged)


@pytest.mark.parametrize("text", ["steps: [1\n", "colour: red\n", "- a\n"])
def test_a_folder_with_a_config_that_is_none(tmp_path, write_config, text):
    place = tmp_path / "place"
    (place / "run/checkpoint_5.tmp").mkdir(parents=True)
    (place / "run/config.yaml").write_text(text)
    (place / "run/metrics.jsonl").write_text("mine\n")
    path = write_config(tmp_path, **TOY, output_dir=str(place / "run"))
    said = refused([path, "resume=auto"], place)
    assert said.startswith(f"{place}/run/config.yaml: ")


def test_a_folder_of_another_run(tmp_path, write_config):
    """One without a checkpoint is moved aside, with all that is in it, also what a kill left half done."""
    place = tmp_path / "place"
    run, aside = place / "run", place / "run.1"
    run.mkdir(parents=True)
    path = write_config(run, **{**TOY, "learning_rate": 1e-6}, output_dir=str(run))
    for name in ("checkpoint_5.tmp", "checkpoint_5.tmp/state", "best_3.old", "best_4.tmp"):
        (run / name).mkdir()
        (run / name / "data").write_text(f"mine, in {name}")
    (run / "metrics.jsonl").write_text("mine\n")
    (run / "predictions.jsonl").write_text("mine, too\n")
    before = contents(run)
    path = write_config(tmp_path, **{**TOY, "steps": 0}, output_dir=str(run))
    train.main([path, "resume=auto"])
    assert contents(aside) == before and names(place) == {"run", "run.1"}
    assert [line["phase"] for line in metrics_of(run)] == ["eval", "eval"]
    assert not any(name.endswith((".tmp", ".old")) for name in names(run))


OTHERS = {
    "steps=1": "after 2 steps; steps: 1 cannot be fewer",
    "learning_rate=1e-5": "with learning_rate: 0.0001, and this run asks for learning_rate: 1e-05; ",
    "eval_limit=1": "with eval_limit: 2, and this run asks for eval_limit: 1; ",
    "eval_annotations={}": "with other sentences or boxes than are in ",
    "train_annotations={}": "with other sentences or boxes than are in ",
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run(finished, tmp_path, world, change):
    """Fewer steps, another setting, another split; not even config.yaml is written."""
    config, run = finished
    records = json.loads((world / "all.json").read_text())
    records["1.y4m"]["caption"] += " again"  # of the two that are held out
    (tmp_path / "other.json").write_text(json.dumps(records))
    (run / "checkpoint_5.tmp").mkdir()
    said = refused([config, "resume=auto", change.format(tmp_path / "other.json")], run.parent)
    assert said.startswith(f"resume: {run}/checkpoint was made {OTHERS[change]}")


def test_beside_a_run_at_work(tmp_path, write_config):
    """A second start while the first is in a step, new or gone on with, is refused, and changes nothing; the
    first one goes on, and when it has ended, however it did, its place is free."""
    place = tmp_path / "place"
    place.mkdir()
    run = place / "run"
    path = write_config(tmp_path, **{**TOY, "steps": 3, "save_every": 1}, output_dir=str(run))
    at_work = f"output_dir: a run is at work in {run}; wait for it, or choose another"
    tried = []

    def second_start():
        for way in ("auto", "never"):
            assert refused([path, f"resume={way}"], place) == at_work
            tried.append(way)

    with at_call(train, "improve", 2, second_start):
        killed(train, "improve", 3, [path])
    with at_call(train, "improve", 1, second_start):
        train.main([path, "resume=auto"])
    assert tried == ["auto", "never"] * 2
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3, 3]
    os.close(run.locked(run))


def test_beside_another_process(finished):
    config, run = finished
    code = "import job, sys, time; run.locked(sys.argv[1]); print('locked', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        for words in (["resume=auto"], ["resume=auto", "steps=4"], ["resume=never"]):
            assert f"a run is at work in {run};" in refused([config, *words], run.parent)
    finally:
        holder.kill()  # which frees the folder
        holder.communicate()
    train.main([config, "resume=auto"])
    assert not (run.parent / "run.1").exists()


# ----------------------------------------------------------------------------------------------------------
# Supervised steps, adapters


MOMENTS = {  # before which call -> the checkpoints that are there then
    "in the first supervised step": (sft, "imitate", 1, set()),
    "in the third supervised step": (sft, "imitate", 3, {"checkpoint_sft_2"}),
    "between the phases": (train, "freeze", 1, {"checkpoint_sft_3"}),
    "in the first sampled step": (train, "improve", 1, {"checkpoint_sft_3"}),
    "in the third sampled step": (train, "improve", 3, {"checkpoint_sft_3", "checkpoint_2"}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_supervised_then_sampled(left_alone, tmp_path, write_config, moment):
    """The reference of the KL is what the supervised steps have made, also for a run that goes on."""
    whole = left_alone(SFT)
    lines = [line for line in metrics_of(whole) if line["phase"] == "grpo"]
    assert [bool(line["kl"]) for line in lines] == [False, True, True]
    path, run = write_config(tmp_path, **SFT), tmp_path / "run"
    *where, kept = MOMENTS[moment]
    killed(*where, [path])
    assert {name for name in names(run) if "checkpoint" in name} == kept
    train.main([path, "resume=auto"])
    assert_same(run, whole)
    kept = {"checkpoint_sft_3", "checkpoint_2", "checkpoint"}
    assert {name for name in names(run) if "checkpoint" in name} == kept


def test_sigterm_in_the_supervised_phase(left_alone, tmp_path, write_config):
    """The signal itself, to a process of its own."""
    settings = {**SFT, "save_every": 0, "steps": 1, "sft": {**SFT["sft"], "steps": 24}}
    path, run = write_config(tmp_path, **settings), tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes()) < 500:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    said = r"stopped after step (\d+) of the supervised phase; go on with: the same command and resume=auto"
    ((step,),) = [re.fullmatch(said, line).groups() for line in out.splitlines() if "stopped" in line]
    assert 1 <= int(step) < 24
    assert {name for name in names(run) if "checkpoint" in name} == {f"checkpoint_sft_{step}"}
    assert metrics_of(run)[-1]["step"] == int(step) and metrics_of(run)[-1]["phase"] == "sft"
    train.main([path, "resume=auto"])
    assert_same(run, left_alone(settings))


@pytest.mark.parametrize("call", [1, 4])
def test_adapters(left_alone, tmp_path, write_config, call):
    """Killed before their first step, when they are drawn anew, and later."""
    path, run = write_config(tmp_path, **LORA), tmp_path / "run"
    killed(train, "improve", call, [path])
    train.main([path, "resume=auto"])
    assert "checkpoint/adapter_model.safetensors" in outcome(run)
    assert_same(run, left_alone(LORA))
    assert metrics_of(run)[4]["kl"] > 0


# ----------------------------------------------------------------------------------------------------------
# What is kept


STEPS = ["before", "step", "step", "step", "after"]
SCORES = {  # m_vIoU of each evaluation -> which is the best
    "in the middle, twice": ([90, 20, 50, 50, 30], 2),
    "the first": ([0, 50, 20, 30, 40], 1),
    "the last": ([0, 10, 20, 30, 40], 4),
    "nothing right": ([0, 0, 0, 0, 0], 1),
    "the model's own": (None, None),
}


@pytest.mark.parametrize("case", SCORES)
def test_what_is_kept(tmp_path, write_config, monkeypatch, case):
    """The newest checkpoint, the end, and the best by m_vIoU after training began: the first of the best;
    also where the run was killed in its last step."""
    settings = {**FOUR, "keep": 1, "save_every": 1, "eval_every": 1}
    path, run = write_config(tmp_path, **settings), tmp_path / "run"
    scores, best = SCORES[case]
    evaluate, score = run.evaluate_split, run.score_predictions
    now, weights = {}, {}

    def evaluate_split(job, samples, when):
        now["step"] = run.progress.step
        assert when == STEPS[now["step"]]
        weights[now["step"]] = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
        return evaluate(job, samples, when)

    def score_predictions(*arguments):
        native = score(*arguments)["native"]
        return {"native": native if scores is None else {**native, "m_vIoU": scores[now["step"]]}}

    monkeypatch.setattr(train, "evaluate_split", evaluate_split)
    monkeypatch.setattr(run, "score_predictions", score_predictions)
    if case in ("in the middle, twice", "the model's own"):
        killed(train, "improve", 4, [path])
    train.main([path, "resume=auto"])
    lines = [line for line in metrics_of(run) if line["phase"] == "eval"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    after = {line["step"]: line["m_vIoU"] for line in lines[1:]}
    wanted = max(after, key=after.get)  # of equal ones the first
    assert best in (None, wanted)
    made = {f"predictions_{n}.jsonl" for n in ("before", 1, 2, 3)} | {"predictions.jsonl"}
    made |= {"config.yaml", "versions.json", "metrics.jsonl", "rollouts.jsonl", "summary.json"}
    assert names(run) == {*made, "checkpoint", "checkpoint_3", f"best_{wanted}"}
    assert not (run / f"best_{wanted}/state").exists()
    for folder, step in {f"best_{wanted}": wanted, "checkpoint_3": 3, "checkpoint": 4}.items():
        exported = load_policy(str(run / folder)).model.state_dict()
        assert exported.keys() == weights[step].keys()
        assert all(torch.equal(value, weights[step][name]) for name, value in exported.items())
    assert not any(
        torch.equal(weights[n]["lm_head.weight"], weights[n + 1]["lm_head.weight"]) for n in range(4)
    )


def test_the_best_at_the_end_is_remembered_when_it_gets_more_steps(tmp_path, write_config, monkeypatch):
    """The last checkpoint is written before the end is evaluated; what comes later must still be better."""
    path, run = write_config(tmp_path, **{**FOUR, "steps": 2, "eval_every": 3}), tmp_path / "run"
    evaluate, score, now = run.evaluate_split, run.score_predictions, {}

    def evaluate_split(job, samples, when):
        now["step"] = run.progress.step
        return evaluate(job, samples, when)

    def score_predictions(*arguments):
        return {"native": {**score(*arguments)["native"], "m_vIoU": {0: 0, 2: 50, 3: 40, 4: 50}[now["step"]]}}

    monkeypatch.setattr(train, "evaluate_split", evaluate_split)
    monkeypatch.setattr(run, "score_predictions", score_predictions)
    train.main([path])
    best = contents(run / "best_2")
    train.main([path, "resume=auto", "steps=4"])
    assert {name for name in names(run) if name.startswith("best")} == {"best_2"}
    assert contents(run / "best_2") == best


def boom():
    raise FloatingPointError("loss nan")


@pytest.mark.parametrize("call", [1, 2])
def test_what_is_not_finite_then_going_on(tmp_path, write_config, left_alone, call):
    """The checkpoint that is left is from before the step: also its logs, which nothing doubles."""
    settings = {**FOUR, "steps": 2}
    path, run = write_config(tmp_path, **settings), tmp_path / "run"
    with at_call(train, "optimizer_step", call, boom), pytest.raises(FloatingPointError):
        train.main([path])
    assert "checkpoint_sft_0" not in names(run)
    train.main([path, "resume=auto"])
    assert_same(run, left_alone(settings))


def test_what_is_not_finite_in_a_second_update(tmp_path, write_config, left_alone):
    """The first update of the batch has changed the weights; no checkpoint may call them those of before."""
    settings = {**FOUR, "steps": 2, "updates_per_batch": 2}
    path, run = write_config(tmp_path, **settings), tmp_path / "run"
    with at_call(train, "optimizer_step", 4, boom), pytest.raises(FloatingPointError):
        train.main([path])
    train.main([path, "resume=auto"])
    assert_same(run, left_alone(settings))


def test_logs_that_are_too_short(finished):
    """Refused before anything is tidied; and the folder is free afterwards."""
    config, run = finished
    (run / "checkpoint_5.tmp").mkdir()
    (run / "rollouts.jsonl").write_text("")
    said = refused([config, "resume=auto", "steps=4"], run.parent, UserError)
    assert said.startswith(f"{run}/rollouts.jsonl: has 0 bytes, and had ")
    os.close(run.locked(run))


def test_the_run_that_was_moved_aside_is_free(tmp_path, write_config):
    path = write_config(tmp_path, **{**TOY, "steps": 0})
    for _ in range(2):
        train.main([path])
    for name in ("run", "run.1"):
        os.close(run.locked(tmp_path / name))
