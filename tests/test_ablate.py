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
from test_tables import parsed

import ablate
import evaluate
import toy
from config import ConfigError, load_config
from files import UserError

ROOT = Path(__file__).parent.parent
METRICS = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
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


def test_rows_and_seeds_a_failure_and_two_more_starts(write_config, tmp_path, monkeypatch, capsys):
    """One run of four cannot begin, since its folder is taken; the others do, and are not trained again when
    the command is repeated: then that run alone, and then nothing."""
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

    (output / "giou_only_seed1/notes.txt").unlink()
    started.clear()
    ablate.main(arguments)
    assert started == ["giou_only_seed1"]
    again = capsys.readouterr().out
    assert sorted(path.name for path in output.glob("*_seed*")) == sorted(runs)
    assert parsed(again)[7]["GIoU only"][0] == "2" and "4 of 4 runs are in" in again

    started.clear()
    dates = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "base.yaml"}
    ablate.main(arguments)
    assert started == []
    assert dates == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.name != "base.yaml"}
    last = capsys.readouterr().out

    # The controls' means are those of evaluate.py, which reads the answers that are there.
    rows = [line.strip("|").split("|") for line in last.partition("Controls: ")[2].splitlines()]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows if len(cells) > 1}
    asked = {"grey frames": "blank", "the frames of another video": "other"}
    for text, control in (asked | {"the frames of the clip in a random order": "shuffled"}).items():
        scores = []
        for run in (output / "rft_think_seed0", output / "rft_think_seed1"):
            evaluate.main([str(run), "--control", control, "--json"])
            scores.append(json.loads(capsys.readouterr().out)["native"])
        means = [f"{statistics.mean(score[metric] for score in scores):.1f}" for metric in METRICS]
        assert rows[text][0] == "2" and [cell.split(" ±")[0] for cell in rows[text][1:]] == means
    assert rows["the videos"] == ["2", *found[5]["RFT + thinking boxes"][1::2]]


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
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from ablate import Task, run_tasks
code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True));"
code += "print('begun', flush=True); [time.sleep(0.1) for _ in range(1000)]"
folder = Path({folder!r})
command = [sys.executable, "-c", code, str(folder)]
run_tasks([Task("stubborn", command, folder / "log", folder / "none")], 1, "")
"""


def test_ctrl_c_and_another_one(tmp_path):
    """A process that does not end when it is asked to is waited for, until it is asked for again."""
    script, log = tmp_path / "stubborn.py", tmp_path / "log"
    script.write_text(STUBBORN.format(root=str(ROOT), folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    for said in (["begun"], ["begun", "asked"]):
        until = time.time() + 60
        while not log.exists() or log.read_text().split() != said:
            assert process.poll() is None and time.time() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0 and gone(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# What is to be done


def test_settings_lie_beneath_the_rows(tmp_path):
    """On train.py's command line `steps=9` would train the row that is not to be trained."""
    base = ablate.prepare([str(ROOT / "configs/hcstvg_v1.yaml"), "steps=9", "rewards.think=0.7"], tmp_path)
    steps, weights = {}, {}
    for row in ablate.PAPER:
        _, _, *files, _, _, _ = ablate.training(row, 0, base, 1).command
        config = load_config(files)
        steps[row], weights[row] = config.steps, config.rewards["think"]
    assert {row for row, count in steps.items() if count == 0} == {"base", "sft"}
    assert set(steps.values()) == {0, 9}
    assert weights == dict.fromkeys(ablate.PAPER, 0.7) | {
        "no_think_reward": 0.0,
        "lambda_0.2": 0.2,
        "lambda_1.0": 1.0,
    }


def test_a_folder_is_for_one_experiment(tmp_path):
    config = str(ROOT / "configs/hcstvg_v1.yaml")
    ablate.prepare([config, "steps=8"], tmp_path)
    ablate.prepare([config, "steps=9"], tmp_path)  # nothing has been run
    (tmp_path / "base_seed0").mkdir()
    (tmp_path / "base_seed0/config.yaml").write_text("")
    ablate.prepare([config, "steps=9", "micro_batch=4", "save_every=5"], tmp_path)  # what is learned stays
    assert load_config(tmp_path / "base.yaml").micro_batch == 4
    for setting, said in {
        "steps=10": "steps: 9 -> 10",
        "learning_rate=1e-5": "learning_rate: 1e-06 -> 1e-05",
        "model=other": "model: Qwen/Qwen2.5-VL-7B-Instruct -> other",
        "eval_limit=5": "eval_limit: 0 -> 5",
    }.items():
        with pytest.raises(ConfigError, match=rf"with other settings \(.*{said}.*\); choose another"):
            ablate.prepare([config, "steps=9", setting], tmp_path)
    assert load_config(tmp_path / "base.yaml").steps == 9


def test_what_each_run_gets_cannot_be_set(tmp_path):
    for setting in ("seed=4", "output_dir=elsewhere"):
        with pytest.raises(ConfigError, match=rf"^{setting}: .* write --seeds or --output"):
            ablate.prepare([setting], tmp_path)
    with pytest.raises(ConfigError, match="unknown key step; did you mean steps"):
        ablate.prepare(["step=4"], tmp_path)
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
    assert Path(word.removeprefix("model=")).resolve() == toy.DIRECT
    assert set(map(tuple, models.values())) == {()}
    task = ablate.training("base", 0, base, 8)
    assert task.command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    asked = ablate.asking(tmp_path / "run", "blank", 2)
    assert asked.command[4:] == ["--nproc_per_node=2", str(ROOT / "evaluate.py"), *asked.command[6:]]
    assert asked.command[6:] == [str(tmp_path / "run"), "--control", "blank"]


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
