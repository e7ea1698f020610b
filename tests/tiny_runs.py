"""Tiny whole runs of train.py: their settings, what they leave behind, how to kill one at a chosen call."""

import contextlib
import hashlib
import itertools
import json
import sys

import pytest
from safetensors.torch import load_file

SHORT = {"think": False, "max_new_tokens": 72}  # as the `taught` checkpoint answers
GRPO = {**SHORT, "steps": 4, "eval_every": 2, "learning_rate": 1e-4, "kl_beta": 0.05, "seed": 3}
TIMED = ("seconds", "tokens_per_second", "peak_memory")  # of metrics.jsonl: never twice the same
BYTES = ("rollouts.jsonl", "watched.jsonl", "predictions_before.jsonl", "predictions.jsonl")


@contextlib.contextmanager
def no_pictures():
    """Drawing takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lab.pictures", None)  # as where matplotlib is not installed
        yield


class Killed(BaseException):
    """Nothing catches it: the disk looks as after signal 9. (tests/kill.py sends that signal.)"""


def die():
    raise Killed


@contextlib.contextmanager
def at_call(module, name, number, act):
    """Call `act` before the call of this number of module.name."""
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
    """Run train.py and kill it before the call of this number of module.name."""
    import train

    with at_call(module, name, number, die), pytest.raises(Killed):
        train.main(arguments)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run, phase=""):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if phase in line["phase"]]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def weights_of(folder):
    """Of a checkpoint: all of them, or its adapters."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def names(folder, part=""):
    return {path.name for path in folder.iterdir() if part in path.name}


def contents(folder):
    """All that is in a folder: relative path -> hash, False for a folder."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {k: p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() for k, p in found.items()}


def assert_same(run, whole):
    """Two runs have come to the same weights, logs and answers, byte for byte."""
    assert metrics_of(run) == metrics_of(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    assert [s.pop("seconds") > 0 for s in summaries] and summaries[0] == summaries[1]
    (weights,) = (whole / "checkpoint").glob("*.safetensors")
    for name in (*BYTES, f"checkpoint/{weights.name}"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
