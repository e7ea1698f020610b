"""logs.py: the clock by a clock that is set by hand, the trackers read back from what they wrote."""

import contextlib
import json
import sys

import numpy as np
import pytest
from ranks import on_ranks

from config import Config, ConfigError
from runtime import logs
from runtime.files import read_jsonl, write_jsonl
from runtime.logs import (
    PARTS,
    WARNINGS,
    Clock,
    Log,
    before_report,
    check_trackers,
    count_warnings,
    drifts_apart,
    flatten,
    kl_alone_grows,
    parse_report,
    warning_of,
)

# Four supervised steps come before the first of reinforcement: each phase counts its own.
SCORES = {"m_vIoU": 12.5, "vIoU@0.3": 1 / 3}
SFT = [{"phase": "sft", "step": n, "loss": 1 / n} for n in (1, 2, 3, 4)]
GRPO = [
    {"phase": "grpo", "step": n, "reward": n / 7, "prompts": 2, "seconds": {"rollout": 0.1 * n, "step": 1.0}}
    for n in range(1, 7)
]
LINES = [{"phase": "eval", "step": 0, **SCORES}, *SFT, *GRPO[:5], {"phase": "eval", "step": 5, **SCORES}]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def write(run, lines, *trackers):
    with contextlib.closing(Log(run, Config(log_to=list(trackers)))) as log:
        for line in lines:
            log.write(line)


def resume_at_step_4(run, *trackers):
    """A run that was killed after LINES resumes from the checkpoint of step 3, with other rewards."""
    write_jsonl(LINES[:8], run / "metrics.jsonl")
    write(run, [{**line, "reward": -1.0} for line in GRPO[3:]], *trackers)


def tags(line):
    """phase/name -> number of a line in metrics.jsonl, by hand."""
    flat = {f"{line['phase']}/{k}": v for k, v in line.items() if k not in ("phase", "step", "seconds")}
    return flat | {f"{line['phase']}/seconds/{k}": v for k, v in line.get("seconds", {}).items()}


def test_numbers_are_found_in_nested_dicts():
    nested = {"a": 1, "b": {"c": 2.5, "d": {"e": -1}}, "f": "text", "g": None, "h": [1]}
    assert flatten(nested) == {"a": 1, "b/c": 2.5, "b/d/e": -1}


def test_tensorboard_shows_each_line_of_the_file_once(run):
    """By what its server would show: of a run, and of the run resumed, whose log is not even closed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    def is_shown():
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
        shown = [
            (tag, event.step, make_ndarray(event.tensor_proto).item())
            for tag in events.Tags()["tensors"]
            for event in events.Tensors(tag)
        ]
        lines = read_jsonl(run / "metrics.jsonl")
        wanted = [(tag, line["step"], np.float32(v)) for line in lines for tag, v in tags(line).items()]
        return sorted(shown) == sorted(wanted)

    write(run, LINES, "tensorboard")
    assert is_shown()
    resume_at_step_4(run, "tensorboard")
    assert is_shown()
    log = Log(run, Config(log_to=["tensorboard"]))
    log.write({**GRPO[0], "step": 7})
    assert is_shown()
    log.close()


def wandb_rows(folder):
    """The rows in a run's file, a log as LevelDB writes it: blocks of 32 KiB of fragments, each after its
    checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, position, message, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # no room for another fragment
            position += 2**15 - position % 2**15
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            items = Record.FromString(message).history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            message = b""
    return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in rows if row]


def test_wandb_gets_each_line_of_the_file_once(run, monkeypatch):
    """Offline, of a run and of the run resumed, of whose files `wandb sync` keeps the later ones."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = set()
    for name in ("first", "second"):
        write(run, LINES, "wandb") if name == "first" else resume_at_step_4(run, "wandb")
        wandb.teardown()  # another process writes the end of its files
        (folder,) = run.glob("wandb/offline-run-*")
        lines = [{**tags(line), "step": line["step"]} for line in read_jsonl(run / "metrics.jsonl")]
        assert wandb_rows(folder) == [{**line, "_step": n} for n, line in enumerate(lines)]
        folder.rename(run / name)  # wandb names its folders by the second
        ids.add((run / "wandb_id").read_text())
    assert len(ids) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^log_to: {name} is not installed; pip install {name}"):
        check_trackers(Config(log_to=[name]))
    check_trackers(Config())


def test_the_clock(monkeypatch):
    """Of nested parts the inner one counts; time in no part counts for the step; also after an error."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    clock = Clock()
    wait(1)
    with contextlib.suppress(KeyError), clock("rollout"):
        wait(2)
        with clock("decode"), clock("wait"):
            wait(4)
        wait(8)
        raise KeyError
    wait(16)
    assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "rollout": 10, "wait": 4, "step": 31}
    with clock("update"):
        wait(32)
        assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "update": 32, "step": 32}
        wait(64)
    assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "update": 64, "step": 64}


def peaks():
    before = logs.peak_memory()
    block = np.ones(200_000_000, np.uint8)
    peak = logs.peak_memory()
    del block
    return before, peak, logs.peak_memory()


def test_peak_memory_stays_at_the_peak():
    ((before, peak, after),) = on_ranks(1, peaks)  # a new process: this one may have been larger
    assert before > 0.05 and peak - before == pytest.approx(0.2, abs=0.01)
    assert after == pytest.approx(peak, abs=0.01)


def lines_of(**columns):
    """Lines of metrics.jsonl, from the values of each key."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_drift_by_hand():
    """Straight lines have no error; nothing is said before DRIFT_LEAST steps, nor of rounding."""
    up, down = np.arange(30) / 10, 1 - np.arange(30) / 100
    assert drifts_apart(lines_of(reward=up, viou_pred=down))
    for reward, viou in ((up, up), (down, down), (down, up)):
        assert not drifts_apart(lines_of(reward=reward, viou_pred=viou))
    assert drifts_apart(lines_of(reward=up, viou_pred=down)[:15])
    assert not drifts_apart(lines_of(reward=up, viou_pred=down)[:14])
    level = lines_of(reward=np.arange(100) / 7, viou_pred=np.arange(100) / 11)
    assert not any(drifts_apart([line] * count) for line in level for count in (15, 22, 30))


def test_drift_against_polyfit():
    """Slopes and standard errors of a second implementation; noise of all sizes, for both answers."""
    rng, answers = np.random.default_rng(0), []
    for n in range(300):
        steps, noise = np.arange(15 + n % 16), rng.normal(0, 0.5 * rng.random(), (15 + n % 16, 2))
        values = np.stack([0.02 * steps, -0.02 * steps], 1) + noise
        lines = [np.polyfit(steps, column, 1, cov=True) for column in values.T]
        (reward, of_reward), (viou, of_viou) = [(line[0], np.sqrt(cov[0, 0])) for line, cov in lines]
        answers.append(drifts_apart(lines_of(reward=values[:, 0], viou_pred=values[:, 1])))
        assert answers[-1] == (reward > 2 * of_reward and viou < -2 * of_viou)
    assert 30 < sum(answers) < 270


def test_the_kl_alone_grows():
    """From 0.03 to 0.3 in 30 steps; not if the reward or vIoU rises, the KL does not double, or is small."""
    kl, level, up = np.linspace(0.03, 0.3, 30), np.tile([1.0, 1.2], 15), np.linspace(1, 2, 30)

    def grows(**columns):
        return kl_alone_grows(lines_of(**{"kl": kl, "reward": level, "viou_pred": level, **columns}))

    assert grows() and grows(reward=-up)
    others = {"reward": up, "viou_pred": up}, {"kl": kl / 10}, {"kl": kl + 0.3}, {"kl": kl[::-1]}
    assert not any(grows(**other) for other in (*others, {"reward": up}, {"viou_pred": up}))
    assert not kl_alone_grows(lines_of(kl=kl, reward=level, viou_pred=level)[:29])


HEALTHY = {"truncated": 0.1, "format": 0.9, "zero_spread": 0.2, "grad_norm": 1.0, "drift": 0.0, "loss": 0.0}


@pytest.mark.parametrize(
    "change, warning, share",
    [
        ({}, "", 0),
        ({"truncated": 0.5, "format": 0.1, "zero_spread": 0.9}, "", 0),  # at the thresholds
        ({"truncated": 0.75}, "cut off", 0.75),
        ({"truncated": 1, "format": 0, "zero_spread": 1, "grad_norm": 0}, "cut off", 1),  # the cause alone
        ({"format": 0.05, "zero_spread": 1, "grad_norm": 0}, "unreadable", 0.95),
        ({"zero_spread": 0.95, "grad_norm": 0}, "no spread", 0.95),
        ({"grad_norm": 0}, "no gradient", 1),
        ({"drift": 1}, "drift", 1),
    ],
)
def test_what_a_step_is_warned_of(change, warning, share):
    assert warning_of(HEALTHY | change, []) == (warning, share)
    assert warning == "" or warning in WARNINGS


def test_warnings_at_the_end():
    """Those of the last step, or of half of the steps."""
    said = ["cut off"] * 4 + ["", "no spread", "", "unreadable"]
    assert count_warnings([{"warning": w} if w else {} for w in said]) == {"cut off": 4, "unreadable": 1}
    assert count_warnings([{"warning": "drift"}, {}, {}]) == count_warnings([]) == {}


def test_how_many_answers_parse():
    """Three of four, one of them cut off; an answer about a video that cannot be read does not count."""
    good = {"completion": "(parsed)", "span": [1, 2], "length": 5, "truncated": False}
    bad = {"completion": "<time> 3 -", "span": None, "length": 4, "truncated": True}
    gone = {"completion": "", "span": None, "unreadable": True}
    config = Config(max_new_tokens=4)
    counts = "3 of 4 answers parse, 1 cut off at max_new_tokens=4"
    place = "one that does not parse begins '<time> 3 -' (the text ends after '<time> 3 -': an integer"
    assert parse_report([good, good, good, bad], config, example=False) == counts
    assert parse_report([good, good, good, bad], config).startswith(f"{counts}; {place}")
    assert before_report([good, bad, bad, bad, gone], config).startswith("before training 1 of 4") and (
        "warning" not in before_report([good, bad, bad, bad], config)
    )
    assert f"warning: {WARNINGS['cut off']}" in before_report([bad] * 6 + [good], config)
    assert f"warning: {WARNINGS['unreadable']}" in before_report([bad | {"truncated": False}] * 6, config)
    assert parse_report([gone], config) == "0 of 0 answers parse, 0 cut off at max_new_tokens=4"
