"""All rows with several seeds by one command: a real run of the tiny world, and the commands of others."""

import json
import sys
from pathlib import Path

import pytest

from config import ConfigError, load_config, save_config
from lab import ablate
from lab.tables import PAPER, ROWS
from runtime.files import DataError, UserError

HCSTVG = str(ROWS.parent / "hcstvg_v1.yaml")


def plan(tmp_path, row, *settings, config=HCSTVG):
    """The configuration that train.py would get, and the command."""
    save_config(load_config([config], settings), tmp_path / "base.yaml")
    run, command = ablate.plan(row, 3, tmp_path, 1)
    assert command[:2] == [sys.executable, str(ablate.ROOT / "train.py")]
    words = command[2:]
    config = load_config([w for w in words if "=" not in w], [w for w in words if "=" in w])
    assert (run.config.seed, run.folder, config.resume) == (3, tmp_path / f"{row}_seed3", "auto")
    assert config == run.config and config.output_dir == str(run.folder)
    return config


def test_a_run_then_nothing_to_do_then_other_settings(write_config, tmp_path, capsys):
    arguments = [write_config(tmp_path), "eval_limit=3", "--rows", "base", "--seeds", "0"]
    arguments += ["--output", str(tmp_path / "rows")]
    ablate.main(arguments)
    printed, reported = capsys.readouterr()
    run = tmp_path / "rows/base_seed0"
    scores = json.loads((run / "summary.json").read_text())["after"]
    assert scores["N"] == 3 and f"| base model, untrained  | 1    | {scores['m_tIoU']:.1f}" in printed
    assert reported.endswith("base_seed0: finished; 0 of 1 left\n")
    assert (tmp_path / "rows/logs/base_seed0.log").stat().st_size > 0
    before = (run / "summary.json").stat().st_mtime_ns
    ablate.main(arguments)
    assert capsys.readouterr() == (printed, "") and (run / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"learning_rate is .*leave one out"):
        ablate.main([*arguments, "--rows", "base", "rft_think", "learning_rate=1"])


def test_a_run_that_fails_is_reported_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "ROOT", tmp_path)  # where there is no train.py
    with pytest.raises(UserError, match=r"^2 of 2 runs failed"):
        ablate.main([HCSTVG, "--rows", "rft", "sft", "--seeds", "0", "--output", str(tmp_path)])
    reported = capsys.readouterr().err
    assert reported.count("FAILED") == 2 and f"see {tmp_path}/logs/rft_seed0.log" in reported
    assert "train.py" in (tmp_path / "logs/rft_seed0.log").read_text()


def test_ctrl_c_asks_the_runs_to_end_and_waits(tmp_path, monkeypatch):
    log = tmp_path / "logs/run.log"
    log.parent.mkdir()

    def ctrl_c(seconds):  # once the run has begun
        if log.read_text() == "begun\n":
            raise KeyboardInterrupt

    monkeypatch.setattr(ablate.time, "sleep", ctrl_c)
    run = ["sh", "-c", "trap 'kill $!; echo saved; exit' TERM; sleep 60 & echo begun; wait"]
    with pytest.raises(KeyboardInterrupt):
        ablate.train({tmp_path / "run": run, tmp_path / "never": ["false"]}, jobs=1)
    assert log.read_text() == "begun\nsaved\n" and not (tmp_path / "logs/never.log").exists()


@pytest.mark.parametrize("row", PAPER)
def test_your_settings_lie_beneath_the_rows(tmp_path, row):  # above them, steps=9 would train `base`
    config = plan(tmp_path, row, "steps=9", "sft.batch_size=5")
    assert config.steps == (0 if row in ("base", "sft") else 9) and config.sft.batch_size == 5
    assert config.sft.steps == (350 if row == "sft" else 0)


@pytest.mark.parametrize(
    "row, setting", [("rft_think", "rewards.think=0.7"), ("base", "sft.steps=9"), ("rft", "steps=0")]
)
def test_settings_that_make_another_row_are_refused(tmp_path, row, setting):
    with pytest.raises(ConfigError, match=f"^{row}: your settings make it another row"):
        plan(tmp_path, row, setting)


def test_the_toy_without_thinking_boxes_begins_with_a_checkpoint_of_its_own(tmp_path):
    models = [plan(tmp_path, row, config=ROWS.parent / "toy.yaml").model for row in ("rft", "rft_think")]
    assert models == ["checkpoints/toy_direct", "checkpoints/toy"]
    assert all((ablate.ROOT / Path(model)).is_dir() for model in models)
    command = ablate.plan("rft", 0, tmp_path, 8)[1]
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc_per_node=8" in command
