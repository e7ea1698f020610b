"""All rows with several seeds by one command: on the tiny world, with failures, stopped and started again."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_compare import parsed

import evaluate
from config import ConfigError, load_config
from lab import ablate
from lab.compare import Run
from runtime.files import DataError, UserError
from toy import pretrain

ROOT = Path(__file__).parent.parent.parent
METRICS = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
ASKED = {
    "grey frames": "blank",
    "the frames of another video": "other",
    "the frames of the clip in a random order": "shuffled",
}
TWO_ROWS = ["--rows", "rft_think", "giou_only", "--seeds", "0", "1"]


def gone(folder, within=10):
    """Whether, after so many seconds at most, no process names the folder on its command line."""
    until = time.time() + within
    while at_work(folder) and time.time() < until:
        time.sleep(0.1)
    return not at_work(folder)


def at_work(folder):
    """Process ids of those that do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if os.fsencode(folder) in command and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def controls_in(printed):
    """{what is shown: cells} of the controls' table."""
    lines = [line.strip("|").split("|") for line in printed.partition("Controls: ")[2].splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if len(cells) > 1}


def test_rows_and_seeds_a_failure_and_another_start(write_config, tmp_path, monkeypatch, capsys):
    """One run of four cannot begin, since its folder is taken; the others do, and are not trained again when
    the command is repeated for a seed: then that run alone. The controls are asked about what is missing."""
    started, begin = [], ablate.start
    monkeypatch.setattr(ablate, "start", lambda task: (started.append(task.name), begin(task))[1])
    output = tmp_path / "rows"
    (output / "giou_only_seed1").mkdir(parents=True)
    (output / "giou_only_seed1/notes.txt").write_text("mine")
    arguments = [write_config(tmp_path), "steps=1", "eval_limit=3", *TWO_ROWS, "--output", str(output)]

    with pytest.raises(UserError, match=r"^1 failed, see above; started again, it goes on with them$"):
        ablate.main(arguments)
    printed, reported = capsys.readouterr()
    taken = f"giou_only_seed1 failed: error: output_dir: {output}/giou_only_seed1 exists and is no run"
    assert taken in reported and f"({output}/logs/giou_only_seed1.log)" in reported
    runs = ["rft_think_seed0", "giou_only_seed0", "rft_think_seed1", "giou_only_seed1"]
    controls = [f"rft_think_seed{seed}_{name}" for seed in (0, 1) for name in ("shuffled", "blank", "other")]
    assert started == runs + controls
    for name, l1, seed in zip(runs[:3], (1.0, 0.0, 1.0), (0, 0, 1), strict=True):
        config = load_config(output / name / "config.yaml")
        assert (config.rewards["l1"], config.seed, config.steps, config.eval_limit) == (l1, seed, 1, 3)
    found = parsed(printed)
    assert found[6]["with the think reward"][0] == "2" and found[7]["GIoU only"][0] == "1"
    assert found[7]["L1 only"][1] == "not run" and "3 of 4 runs are in" in printed
    for k, metric in enumerate(METRICS):
        summaries = [json.loads((output / run / "summary.json").read_text()) for run in runs[0:3:2]]
        values = [summary["after"][metric] for summary in summaries]
        spread = abs(values[0] - values[1]) / 2**0.5
        assert found[5]["RFT + thinking boxes"][1 + 2 * k] == f"{sum(values) / 2:.1f} ± {spread:.1f}"

    # The controls' means are those of evaluate.py, which reads the answers that are there.
    rows = controls_in(printed)
    for text, control in ASKED.items():
        scores = []
        for run in (output / "rft_think_seed0", output / "rft_think_seed1"):
            evaluate.main([str(run), "--control", control, "--json"])
            scores.append(json.loads(capsys.readouterr().out)["native"])
        means = [f"{statistics.mean(score[metric] for score in scores):.1f}" for metric in METRICS]
        assert rows[text][0] == "2" and [cell.split(" ±")[0] for cell in rows[text][1:]] == means
    assert rows["the videos"] == ["2", *found[5]["RFT + thinking boxes"][1::2]]

    # Of one control a single answer is left, as of a quick look; another's answers are now of other settings;
    # a third one has more than those that count.
    (output / "giou_only_seed1/notes.txt").unlink()
    started.clear()
    run = output / "rft_think_seed1"
    few, foreign, many = (run / f"predictions_{name}.jsonl" for name in ("blank", "other", "shuffled"))
    before = few.read_text()
    few.write_text(before.splitlines(keepends=True)[0])
    foreign.write_text(foreign.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    evaluate.main([str(run), "--control", "shuffled", "eval_limit=5"])
    capsys.readouterr()
    assert len(many.read_text().splitlines()) == 5
    dates = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != few and path.is_file()}
    with pytest.raises(UserError, match=r"^1 failed, see above"):
        ablate.main([*arguments, "--seeds", "1"])
    again, reported = capsys.readouterr()
    assert started == ["giou_only_seed1", *controls[3:]]
    assert f"rft_think_seed1_other failed: error: {foreign}: holds answers made in another way" in reported
    assert few.read_text() == before
    assert dates == {path: path.stat().st_mtime_ns for path in dates}
    assert sorted(path.name for path in output.glob("*_seed*")) == sorted(runs)
    assert parsed(again)[7]["GIoU only"][0] == "1" and "2 of 2 runs are in" in again
    rows = controls_in(again)
    assert rows["the frames of another video"] == ["0", *4 * ["not run"]]
    for text, path in {"grey frames": few, "the frames of the clip in a random order": many}.items():
        evaluate.main([str(run), "--control", path.stem.removeprefix("predictions_"), "--json"])
        scores = json.loads(capsys.readouterr().out)["native"]
        assert rows[text] == ["1", *(f"{scores[metric]:.1f}" for metric in METRICS)]


def test_a_control_that_is_not_answered_in_full(write_config, tmp_path):
    """Its missing answers would be failures, which controls should have."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "predictions_blank.jsonl").write_text('{"id": "0.y4m", "completion": ""}\n')
    config = load_config(write_config(tmp_path, eval_limit=3))
    said = "predictions_blank.jsonl: 2 sentences have no answer; start ablate.py again"
    with pytest.raises(DataError, match=f"^{run}/{said}$"):
        ablate.control_scores(Run(run, config, {}, "rft_think"), "blank")


def test_a_signal_ends_the_runs_with_a_checkpoint(write_config, tmp_path):
    output = tmp_path / "stopped"
    arguments = [write_config(tmp_path), "steps=100000", "eval_limit=1", *TWO_ROWS, "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ablate.py"), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    runs = [output / "rft_think_seed0", output / "giou_only_seed0"]
    until = time.time() + 100
    while not all((run / "rollouts.jsonl").exists() for run in runs):
        assert process.poll() is None and time.time() < until
        time.sleep(0.1)
    process.terminate()  # and not the children
    _, reported = process.communicate(timeout=60)
    assert process.returncode == 1 and reported.splitlines()[-1] == "stopped; the same command goes on"
    assert gone(output)
    for run in runs:
        assert list(run.glob("checkpoint_*/state")), (output / f"logs/{run.name}.log").read_text()


STUBBORN = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[0]).parent, os.environ.get("RANK", "0")
signal.signal(signal.SIGTERM, lambda *_: (folder / f"asked{rank}").touch())
(folder / f"begun{rank}").touch()
time.sleep(100)
"""
STARTER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from ablate import Task, run_tasks, script
folder = Path({folder!r})
command = script(str(folder / "stubborn.py"), {nproc})
run_tasks([Task("stubborn", command, folder / "log", folder / "none")], 1, "")
"""


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_and_another_one(tmp_path, nproc):
    """A process that does not end when it is asked to is waited for, until it is asked for again; torchrun's
    ranks, which are in sessions of their own, too."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    starter = tmp_path / "starter.py"
    starter.write_text(STARTER.format(root=str(ROOT), folder=str(tmp_path), nproc=nproc))
    process = subprocess.Popen([sys.executable, str(starter)], stderr=subprocess.DEVNULL)
    for what in ("begun", "asked"):
        until = time.time() + 60
        while not all((tmp_path / f"{what}{rank}").exists() for rank in range(nproc)):
            assert process.poll() is None and time.time() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0 and gone(tmp_path)


def test_descendants():
    """A shell that has started a shell that has started a sleep; the other children of the test are not
    its."""
    other = subprocess.Popen(["sleep", "60"])
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & echo $$ $!; wait' & echo $!; wait"], stdout=-1)
    try:
        told = sorted({int(number) for number in (shell.stdout.readline() + shell.stdout.readline()).split()})
        assert len(told) == 2 and sorted(ablate.descendants(shell.pid)) == told
        assert {other.pid, shell.pid, *told} <= set(ablate.descendants(os.getpid()))
        assert ablate.descendants(told[-1]) == ablate.descendants(other.pid) == []
    finally:
        for number in (other.pid, shell.pid, *ablate.descendants(shell.pid)):
            os.kill(number, signal.SIGKILL)
        other.wait()
        shell.communicate()


# ----------------------------------------------------------------------------------------------------------
# What is to be done


def test_settings_lie_beneath_the_rows(tmp_path):
    """On train.py's command line `steps=9` would train the row that is not to be trained."""
    words = [str(ROOT / "configs/hcstvg_v1.yaml"), "steps=9", "sft.batch_size=5"]
    base = ablate.prepare(words, tmp_path, list(ablate.PAPER))
    steps, sft, weights = {}, {}, {}
    for row in ablate.PAPER:
        _, _, *files, _, _, _ = ablate.training(row, 0, base, 1).command
        config = load_config(files)
        steps[row], sft[row], weights[row] = config.steps, config.sft, config.rewards["think"]
    assert steps == dict.fromkeys(ablate.PAPER, 9) | {"base": 0, "sft": 0}
    assert {phase.batch_size for phase in sft.values()} == {5}
    assert {row: phase.steps for row, phase in sft.items() if phase.steps} == {"sft": 350}
    assert weights == dict.fromkeys(ablate.PAPER, 0.5) | {
        "no_think_reward": 0.0,
        "lambda_0.2": 0.2,
        "lambda_1.0": 1.0,
    }


REWARDED = "rft, rft_think, no_think_reward, giou_only, l1_only, lambda_0.2, lambda_1.0"
SPOILT = {  # a setting beneath the rows: what is said of it and of the rows that it changes
    "rewards.think=0.7": r"rewards.think: 0.7 \(beneath rft, rft_think, giou_only, l1_only\): such",
    "sft.steps=100": rf"sft.steps: 100 \(beneath base, {REWARDED}\): such",
    "steps=0": rf"steps: 0 \(beneath {REWARDED}\): such",
    "think=false": rf"think: False \(beneath base, sft, {REWARDED.removeprefix('rft, ')}\): such",
    "steps=0 think=false": rf"think: False \(beneath base, sft\); steps: 0 \(beneath {REWARDED}\): such",
    "rewards.OWN:one=0.5": rf"rewards.OWN:one: 0.5 \(beneath {REWARDED}\): such",
}


@pytest.mark.parametrize("setting", SPOILT)
def test_settings_that_leave_no_row(tmp_path, setting):
    """A row must be recognised by tables.py when it has been trained; that is seen before."""
    own = tmp_path / "own.py"
    own.write_text("def one(answer, truth):\n    return 1.0\n")
    words = [str(ROOT / "configs/hcstvg_v1.yaml"), *setting.replace("OWN", str(own)).split()]
    said = SPOILT[setting].replace("OWN", str(own))
    with pytest.raises(ConfigError, match=rf"^{said} .*; leave it out, or name other --rows$") as caught:
        ablate.prepare(words, tmp_path / "rows", list(ablate.PAPER))
    assert "\n" not in str(caught.value)


def test_settings_that_leave_the_rows_that_are_asked_for(tmp_path):
    """They set the weight themselves, or learn from no reward. One that is only watched changes no row."""
    own = tmp_path / "own.py"
    own.write_text("def one(answer, truth):\n    return 1.0\n")
    hcstvg = str(ROOT / "configs/hcstvg_v1.yaml")
    ablate.prepare([hcstvg, "rewards.think=0.7"], tmp_path, ["base", "sft", "no_think_reward", "lambda_0.2"])
    ablate.prepare([hcstvg, "think=false"], tmp_path, ["rft"])
    ablate.prepare([hcstvg, f"rewards.{own}:one=0"], tmp_path, list(ablate.PAPER))


def test_a_folder_is_for_one_experiment(tmp_path):
    config = str(ROOT / "configs/hcstvg_v1.yaml")
    ablate.prepare([config, "steps=8"], tmp_path, ["rft"])
    ablate.prepare([config, "steps=9"], tmp_path, ["rft"])  # nothing has been run
    (tmp_path / "base_seed0").mkdir()
    (tmp_path / "base_seed0/config.yaml").write_text("")
    free = ["micro_batch=4", "save_every=5"]  # what is learned stays
    ablate.prepare([config, "steps=9", *free], tmp_path, ["rft"])
    assert load_config(tmp_path / "base.yaml").micro_batch == 4
    for setting, said in {
        "steps=10": "steps: 9 -> 10",
        "learning_rate=1e-5": "learning_rate: 1e-06 -> 1e-05",
        "model=other": "model: Qwen/Qwen2.5-VL-7B-Instruct -> other",
        "eval_limit=5": "eval_limit: 0 -> 5",
    }.items():
        with pytest.raises(ConfigError, match=rf"with other settings \(.*{said}.*\); choose another"):
            ablate.prepare([config, "steps=9", setting], tmp_path, ["rft"])
    assert load_config(tmp_path / "base.yaml").steps == 9


def test_what_each_run_gets_cannot_be_set(tmp_path):
    for setting in ("seed=4", "output_dir=elsewhere"):
        with pytest.raises(ConfigError, match=rf"^{setting}: .* write --seeds or --output"):
            ablate.prepare([setting], tmp_path, ["rft"])
    with pytest.raises(ConfigError, match="unknown key step; did you mean steps"):
        ablate.prepare(["step=4"], tmp_path, ["rft"])
    assert list(tmp_path.iterdir()) == []


def test_commands(tmp_path):
    """The toy's checkpoint that has learned to answer without thinking boxes, where it is asked to; torchrun
    for more processes than one."""
    models = {}
    for config in ("toy", "hcstvg_v1"):
        base = tmp_path / config / "base.yaml"
        base.parent.mkdir()
        base.write_text((ROOT / f"configs/{config}.yaml").read_text())
        for row in ("rft", "rft_think"):
            task = ablate.training(row, 3, base, 1)
            run = tmp_path / config / f"{row}_seed3"
            assert task.command[:4] == [sys.executable, str(ROOT / "train.py"), str(base), task.command[3]]
            assert {"resume=auto", "seed=3", f"output_dir={run}"} <= set(task.command)
            assert (task.result, task.log) == (run / "summary.json", run.parent / f"logs/{row}_seed3.log")
            models[config, row] = [word for word in task.command if word.startswith("model=")]
    (word,) = models.pop(("toy", "rft"))
    assert Path(word.removeprefix("model=")).resolve() == pretrain.DIRECT
    assert set(map(tuple, models.values())) == {()}
    task = ablate.training("base", 0, base, 8)
    assert task.command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert task.command[5:7] == ["--shutdown-timeout=600", str(ROOT / "train.py")]
    asked = ablate.asking(tmp_path / "run", "blank", 2)
    assert asked.command[4:7:2] == ["--nproc_per_node=2", str(ROOT / "evaluate.py")]
    answers = str(tmp_path / "run/predictions_blank.jsonl")
    assert asked.command[7:] == [str(tmp_path / "run"), "--control", "blank", "--output", answers]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("GRPO:  10%\rGRPO:  20%\nerror: the disk is full\n", "error: the disk is full"),
        ("error: model: no such\nTraceback:\n=====\nRoot Cause\n=====\n", "error: model: no such"),
        ("Traceback:\n  line 5\nValueError: five\n\n", "ValueError: five"),
        ("GRPO: 10%\rGRPO: 50%", "GRPO: 50%"),
        ("", "it printed nothing"),
    ],
)
def test_the_line_of_a_log_that_says_why(tmp_path, text, last):
    (tmp_path / "a.log").write_text(text)
    assert ablate.last_line(tmp_path / "a.log") == last
