"""Many ranks against one: the same rollouts, losses and weights; unequal answers; what ends a run, and how."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parent.parent
TIMED = ("seconds", "tokens_per_second", "peak_memory")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def torchrun(ranks, arguments, cwd, **environment):
    """train.py by torchrun, as a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=240):
    """(exit code, stdout, stderr), and no hang."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------
# The same run on any number of ranks


TOY = {"model": str(ROOT / "checkpoints/toy"), "max_new_tokens": 192, "num_generations": 4, "batch_size": 8}
TOY |= {"steps": 5, "learning_rate": 1e-4, "eval_limit": 6, "kl_beta": 0.05, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_config):
    """(ranks, rollout_batch, reduce_gradients) -> folder of a run of five steps of the toy's checkpoint."""
    folders = {}

    def run(ranks, rollout_batch, reduce_gradients="last"):
        key = ranks, rollout_batch, reduce_gradients
        if key not in folders:
            folder = tmp_path_factory.mktemp("parallel")
            settings = {"rollout_batch": rollout_batch, "reduce_gradients": reduce_gradients}
            config = write_config(folder, **TOY, **settings)
            if ranks == 1:
                train.main([config])
            else:
                code, _, err = finish(torchrun(ranks, [config], folder))
                assert code == 0, err
            folders[key] = folder / "run"
        return folders[key]

    return run


@pytest.mark.parametrize(
    "other", [(1, 2), (1, 1), (2, 4), (2, 1, "each"), (4, 2)], ids=lambda key: "-".join(map(str, key))
)
def test_ranks_and_parts_change_nothing(runs, other):
    """Against one process that takes the batch of eight as it is: 1 x 8, 2 x 4, 4 x 2, 8 x 1, and those spread
    over two and four ranks, with one exchange of gradients a step or one a part."""
    one, many = runs(1, 8), runs(*other)
    rollouts, expected = (read_lines(run / "rollouts.jsonl") for run in (many, one))
    assert len(rollouts) == 5 * 8 * 4 and any(r["advantage"] for r in rollouts)
    assert [r["completion"] for r in rollouts] == [r["completion"] for r in expected]
    assert rollouts == expected
    for line, wanted in zip(
        read_lines(many / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True
    ):
        assert line.keys() == wanted.keys()
        assert line["phase"] == wanted["phase"]
        for name in line.keys() - {"phase", *TIMED}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    start = load_file(ROOT / "checkpoints/toy/model.safetensors")
    weights, wanted = (load_file(run / "checkpoint/model.safetensors") for run in (many, one))
    assert weights.keys() == wanted.keys() == start.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=1e-5)
    assert max((wanted[name] - start[name]).abs().max() for name in start) > 1e-4


def test_a_batch_that_does_not_divide(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(train.distributed, "join", lambda: (0, 8))
    for setting, nearest in {"batch_size=100": "96 or 104", "batch_size=3": "8"}.items():
        size = setting.partition("=")[2]
        with pytest.raises(
            train.ConfigError,
            match=f"^batch_size: {size} prompts do not divide among 8 ranks; {nearest} would$",
        ):
            train.main([write_config(tmp_path), setting])
    message = r"^sft.batch_size: 12 prompts do not divide among 8 ranks; 8 or 16 would$"
    with pytest.raises(train.ConfigError, match=message):
        train.main([write_config(tmp_path), "batch_size=8", "sft.steps=1", "sft.batch_size=12"])
