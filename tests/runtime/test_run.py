"""Runs that are killed, stopped, started beside themselves or asked for more steps: whole runs of train.py.

Each must end with the bytes of a run that nothing has happened to.
"""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch
import yaml
from tiny_runs import assert_same, at_call, contents, killed, metrics_of, names, weights_of

import runtime.run
import train
from config import Config
from runtime.files import UserError
from runtime.run import Run, global_batch

ONE = {"eval_every": 0, "eval_limit": 1}  # as few evaluations as can be
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def place(finished, tmp_path, grpo_config):
    """(configuration, folder) of a finished run, to resume or to spoil; nothing else stands in its parent."""
    run = shutil.copytree(finished, tmp_path / "place/run")
    config = grpo_config(tmp_path, output_dir=str(run), save_every=2)
    shutil.copy(config, run / "config.yaml")
    return config, run


def refused(arguments, folder, match):
    """In one line; nothing in the folder changes."""
    before = contents(folder)
    with pytest.raises(UserError, match=match) as caught:
        train.main(arguments)
    assert "\n" not in str(caught.value) and contents(folder) == before


def assert_free(run):
    """No lock is left on a folder."""
    folder = os.open(run, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def sigterm():
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # or pytest would end
    signal.raise_signal(signal.SIGTERM)


def boom():
    raise FloatingPointError("loss nan")


def test_batches_are_epochs():
    """Seven sentences, batches of three: any seven in a row are all of them, in each epoch's own order."""
    letters = list("abcdefg")
    stream = [letter for step in range(14) for letter in global_batch(letters, 3, step, seed=5)]
    epochs = ["".join(stream[k : k + 7]) for k in range(0, 42, 7)]
    assert all(Counter(epoch) == Counter(letters) for epoch in epochs) and len(set(epochs)) == 6
    assert stream[:3] == global_batch(letters, 3, 0, seed=5) != global_batch(letters, 3, 0, seed=6)
    assert Counter(global_batch(letters, 16, 0, seed=0)).most_common()[-1][1] == 2  # more than there are


def test_more_steps(finished, tmp_path, grpo_config):
    """Two steps, the second of them with a signal; the end, whose checkpoint was being replaced; two steps
    more, killed in the first of them and before the summary."""
    path, run = grpo_config(tmp_path, steps=2), tmp_path / "run"
    with at_call(train, "update", 2, sigterm):
        train.main([path])
    assert names(run, "checkpoint") == {"checkpoint_2"} and not (run / "predictions.jsonl").exists()
    train.main([path, "resume=auto"])
    assert names(run, "checkpoint") == {"checkpoint", "checkpoint_2"} and (run / "summary.json").exists()
    (run / "checkpoint").rename(run / "checkpoint.old")
    shutil.copytree(run / "checkpoint.old/state", run / "checkpoint.tmp/state")

    more = [path, "resume=auto", "steps=4"]
    killed(train, "update", 1, more)
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 4
    assert not (run / "summary.json").exists()  # which would say that it has ended
    assert names(run, "predictions") == {"predictions_before.jsonl", "predictions_2.jsonl"}
    killed(train, "report", 1, more)
    train.main(more)
    assert_same(run, finished)
    assert (run / "predictions_2.jsonl").read_bytes() == (finished / "predictions_2.jsonl").read_bytes()
    assert names(run, "best") == names(finished, "best")
    assert names(tmp_path) == {"config.yaml", "run"} and not names(run, ".tmp") | names(run, ".old")


def test_nothing_more_to_do(finished, place):
    """A finished run that is started again decodes nothing, and says the same."""
    config, run = place
    stamp = (run / "checkpoint").stat().st_mtime_ns
    train.main([config, "resume=auto"])
    assert_same(run, finished)
    assert (run / "checkpoint").stat().st_mtime_ns == stamp and names(run) == names(finished)


def test_killed_without_a_checkpoint_and_a_loss_that_is_not_finite(finished, tmp_path, grpo_config):
    """Without a checkpoint it starts again in its place, and what was being written goes. A loss that is not
    finite leaves a checkpoint from before the step: also of its logs, which nothing doubles."""
    path, run = grpo_config(tmp_path), tmp_path / "run"
    with at_call(train, "update", 1, boom), pytest.raises(FloatingPointError, match="after step 0: loss nan"):
        train.main([path])
    killed(train, "update", 3, [path, "resume=auto"])
    assert names(run, "checkpoint") == set() and len(metrics_of(run, "grpo")) == 2
    (run / "checkpoint_2.tmp/state").mkdir(parents=True)
    with (run / "watched.jsonl").open("a") as file:
        file.write('{"step": 2, "id": "0.y')
    (run / "summary.json.01234567.tmp").write_text("{")
    said = r"after step 2: loss nan\. The batch was .\.y4m, .\.y4m; .*resume=auto repeats it"
    with at_call(train, "update", 3, boom), pytest.raises(FloatingPointError, match=said):
        train.main([path, "resume=auto"])
    assert names(run, "checkpoint") == {"checkpoint_2"}
    train.main([path, "resume=auto"])
    assert_same(run, finished)
    assert names(tmp_path) == {"config.yaml", "run"} and not names(run, ".tmp")


def test_a_loss_that_is_not_finite_in_a_second_update(tmp_path, grpo_config):
    """The first one has changed the weights: no checkpoint may call them those of before."""
    path = grpo_config(tmp_path, steps=2, updates_per_batch=2, **ONE)
    with at_call(torch.nn.utils, "clip_grad_norm_", 4, boom), pytest.raises(FloatingPointError):
        train.main([path])
    assert names(tmp_path / "run", "checkpoint") == set()


def test_supervised_then_sampled(tmp_path, grpo_config):
    """The reference of the KL is what the supervised steps have made, also in a resumed run."""
    sft = {"sft": {"steps": 3, "learning_rate": 1e-4, "batch_size": 2}, "steps": 2}
    settings = {**sft, **ONE, "save_every": 1, "keep_checkpoints": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main([grpo_config(tmp_path, **settings, output_dir=str(whole))])
    assert [line["kl"] > 0 for line in metrics_of(whole, "grpo")] == [False, True]
    words = [grpo_config(tmp_path, **settings), "resume=auto"]

    with at_call(train, "update", 1, sigterm):
        train.main(words)
    assert names(run, "checkpoint") == {"checkpoint_sft_1"}
    for name, call, kept in (
        ("update", 2, {"checkpoint_sft_2"}),  # in the third supervised step
        ("freeze", 1, {"checkpoint_sft_3"}),  # between the phases
        ("update", 1, {"checkpoint_sft_3"}),  # in the first sampled step
        ("update", 2, {"checkpoint_sft_3", "checkpoint_1"}),  # in the second one
    ):
        killed(train, name, call, words)
        assert names(run, "checkpoint") == kept
    train.main(words)
    assert_same(run, whole)
    assert names(run, "checkpoint") == {"checkpoint_sft_3", "checkpoint_1", "checkpoint"}


def test_adapters(tmp_path, grpo_config):
    """Killed in their first step, when they are drawn anew, and later."""
    settings = {**ONE, "lora": {"rank": 4}, "learning_rate": 1e-3, "steps": 3, "save_every": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main([grpo_config(tmp_path, **settings, output_dir=str(whole))])
    words = [grpo_config(tmp_path, **settings), "resume=auto"]
    killed(train, "update", 1, words)
    killed(train, "update", 3, words)
    train.main(words)
    assert_same(run, whole)
    assert (run / "checkpoint/adapter_model.safetensors").exists() and metrics_of(run, "grpo")[1]["kl"] > 0
    adapters = weights_of(run / "checkpoint")
    assert max(value.abs().max() for name, value in adapters.items() if "_B" in name) > 0


def test_drift_is_looked_for_in_the_last_steps_also_after_a_kill(tmp_path, grpo_config, monkeypatch):
    """Of reward and vIoU as they stand in the log, here of two steps."""
    path, run, seen = grpo_config(tmp_path, **ONE, save_every=1), tmp_path / "run", []
    monkeypatch.setattr(runtime.run, "DRIFT_STEPS", 2)
    monkeypatch.setattr(runtime.run, "drifts_apart", lambda last: seen.append(list(last)) or len(seen) > 3)
    killed(train, "update", 4, [path])
    train.main([path, "resume=auto"])
    lines = metrics_of(run, "grpo")
    steps = [[line["reward"] for line in recent] for recent in seen]
    rewards = [line["reward"] for line in lines]
    assert steps == [rewards[:1], rewards[:2], rewards[1:3], rewards[2:]]
    assert [line["drift"] for line in lines] == [0, 0, 0, 1]


def test_a_run_that_learns_nothing_says_so(tmp_path, grpo_config, capsys):
    """Three tokens are too few for any answer: once before, once in the first step, and at the end."""
    train.main([grpo_config(tmp_path, **ONE, steps=3, max_new_tokens=3), "resume=auto"])
    out, err = capsys.readouterr()
    assert "before training 0 of 1 answers parse, 1 cut off at max_new_tokens=3; one" in err
    assert err.count("warning, step 1: most answers are cut off") == err.count("warning, step") == 1
    assert "(cut off!)" in err and "warning, in 3 of 3 steps: most answers are cut off" in out
    assert [line["warning"] for line in metrics_of(tmp_path / "run", "grpo")] == ["cut off"] * 3
    assert json.loads((tmp_path / "run/summary.json").read_text())["warnings"] == {"cut off": 3}


def test_a_warning_is_repeated_when_it_gets_worse(capsys):
    """By more than 0.2, each warning by itself."""
    run = types.SimpleNamespace(said={}, config=Config())
    shares = [("no spread", 0.5), ("no spread", 0.7), ("no gradient", 1), ("no spread", 0.71)]
    for step, (warning, share) in enumerate([*shares, ("no spread", 0.9), ("no spread", 1)]):
        Run._warn(run, warning, share, step, [])
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"warning, step {n}" for n in (1, 3, 4, 6)]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_wrong_setting_is_said_without_torch(script):
    command = [sys.executable, "-X", "importtime", script, "learning_rat=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(train.__file__).parent)
    *imports, message = done.stderr.strip().splitlines()
    assert message == "error: command line: unknown key learning_rat; did you mean learning_rate?"
    assert done.returncode == 1 and not any("torch" in line for line in imports)


def test_seconds_of_all_starts(tmp_path, grpo_config, monkeypatch):
    """Up to the checkpoint, 10; not the 100 that a kill has cost; and 5 after it, also where the machine and
    with it the clock has started again."""
    path, now = grpo_config(tmp_path, **ONE, steps=2, save_every=1), [1000.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(runtime.run, "time", clock)
    monkeypatch.setattr(train, "time", clock)

    def passes(seconds):
        now[0] += seconds

    with (
        at_call(train, "update", 1, lambda: passes(10)),
        at_call(train, "make_prompts", 2, lambda: passes(100)),
    ):
        killed(train, "update", 2, [path])
    now[0] = 50.0
    with at_call(train, "report", 1, lambda: passes(5)):
        train.main([path, "resume=auto"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["seconds"] == 15


def test_what_is_kept(tmp_path, grpo_config, monkeypatch):
    """The newest checkpoint, the end, and the best by m_vIoU after training began, the first of equal ones;
    also where the run was killed in its last step, and gets more steps after its end was the best."""
    viou, score = {0: 90, 3: 20, 4: 50, 6: 50}, train.score_predictions
    path = grpo_config(tmp_path, eval_every=3, eval_limit=1, save_every=1, keep_checkpoints=1)
    run = tmp_path / "run"

    def rigged(*arguments):
        step = metrics_of(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0
        return {"native": {**score(*arguments)["native"], "m_vIoU": viou[step]}}

    monkeypatch.setattr(train, "score_predictions", rigged)
    killed(train, "update", 4, [path])
    assert names(run, "checkpoint") | names(run, "best") == {"checkpoint_3", "best_3"}
    train.main([path, "resume=auto"])
    assert names(run, "checkpoint") | names(run, "best") == {"checkpoint_3", "checkpoint", "best_4"}
    best, end, before = (weights_of(run / name) for name in ("best_4", "checkpoint", "checkpoint_3"))
    assert all(torch.equal(best[name], end[name]) for name in end)
    assert not all(torch.equal(best[name], before[name]) for name in end)
    assert not (run / "best_4/state").exists()
    kept = contents(run / "best_4")
    train.main([path, "resume=auto", "steps=6"])
    assert names(run, "checkpoint") | names(run, "best") == {"checkpoint_5", "checkpoint", "best_4"}
    assert contents(run / "best_4") == kept
    assert [line["m_vIoU"] for line in metrics_of(run, "eval")] == [90, 20, 50]


REFUSED = {
    "train_annotations={}/other.json": "data: ",
    "no state": "no checkpoint in .* is whole",
    "short log": r"rollouts\.jsonl: is shorter",
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_or_a_spoilt_one_is_refused(place, tmp_path, world, case):
    """Not even config.yaml is written; and the folder is free afterwards."""
    config, run = place
    records = json.loads((world / "all.json").read_text())
    records["1.y4m"]["caption"] += " again"
    (tmp_path / "other.json").write_text(json.dumps(records))
    (run / "checkpoint_5.tmp").mkdir()
    if case == "short log":
        (run / "rollouts.jsonl").write_text("")
    if case == "no state":
        for folder in ("checkpoint", "checkpoint_2"):
            shutil.rmtree(run / folder / "state")
    change = case.format(tmp_path) if "=" in case else "steps=6"
    refused([config, "resume=auto", change], run.parent, REFUSED[case])
    assert_free(run)


def test_a_folder_of_another_run_without_a_checkpoint(place, grpo_config, tmp_path):
    """It is moved aside with all that is in it, also what a kill left half done; both folders are free."""
    config, run = place
    for folder in ("checkpoint", "checkpoint_2"):
        (run / folder).rename(run / f"{folder}.tmp")
    before = contents(run)
    train.main([config, "resume=auto", "steps=0", "learning_rate=0"])
    assert names(run.parent) == {"run", "run.1"} and contents(run.parent / "run.1") == before
    assert [line["phase"] for line in metrics_of(run)] == ["eval", "eval"] and not names(run, ".tmp")
    assert_free(run)
    assert_free(run.parent / "run.1")


def test_beside_a_run_at_work(tmp_path, grpo_config):
    """A second start while the first makes its folder, or is in a step, is refused, and changes nothing; the
    first one goes on."""
    path = grpo_config(tmp_path, steps=2, **ONE)
    tried = []

    def second_start():
        for way in ("auto", "never"):
            refused([path, f"resume={way}"], tmp_path, "a run is at work in .*; wait for it, or choose")
            tried.append(way)

    with at_call(runtime.run, "save_config", 1, second_start), at_call(train, "update", 2, second_start):
        train.main([path])
    assert tried == ["auto", "never"] * 2
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 2]
    assert_free(tmp_path / "run")


def test_folders_that_were_not_begun(tmp_path, grpo_config):
    """What a kill has left before config.yaml was there is nothing; a stranger's file is something."""
    path, run = grpo_config(tmp_path, steps=0, **ONE), tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml.tmp", "notes.01234567.tmp", "config.yaml.mine.01234567.tmp", "a"):
        (run / name).write_text("mine")
        refused([path, "resume=auto"], tmp_path, "run exists and is no run of train.py; choose another")
        (run / name).unlink()
    for _ in range(2):
        killed(pathlib.Path, "replace", 1, [path, "resume=auto"])  # of config.yaml
        assert len(names(run, "config.yaml.")) == 1 and not (run / "config.yaml").exists()
    killed(pathlib.Path, "replace", 2, [path, "resume=auto"])  # of versions.json
    assert names(run, "config.yaml") == {"config.yaml"} and not (run / "versions.json").exists()
    train.main([path, "resume=auto"])
    assert (run / "versions.json").exists() and not names(run, ".tmp")
    assert names(tmp_path) == {"config.yaml", "run"}
