"""logs.py: the clock and the memory against the system's own; the trackers read back from what they wrote."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from config import Config, ConfigError, load_config
from runtime import logs
from runtime.files import read_jsonl, write_jsonl
from runtime.logs import PARTS, Clock, Log, draw_pictures, drifts_apart, flatten, send_answers
from runtime.trackers import check_trackers

ROOT = Path(__file__).parent.parent.parent

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


def go_on_at_step_4(run, *trackers):
    """A run that was killed after LINES goes on from the checkpoint of step 3, with other rewards."""
    kept = read_jsonl(run / "metrics.jsonl")[:8]
    assert kept[-1]["step"] == 3
    write_jsonl(kept, run / "metrics.jsonl")
    write(run, [{**line, "reward": -1.0} for line in GRPO[3:]], *trackers)


def tags(line):
    """phase/name -> number of a line in metrics.jsonl, by hand."""
    flat = {f"{line['phase']}/{k}": v for k, v in line.items() if k not in ("phase", "step", "seconds")}
    return flat | {f"{line['phase']}/seconds/{k}": v for k, v in line.get("seconds", {}).items()}


def points(run):
    """tag -> [(step, number)] of the lines in metrics.jsonl."""
    found = {}
    for line in read_jsonl(run / "metrics.jsonl"):
        for tag, number in tags(line).items():
            found.setdefault(tag, []).append((line["step"], number))
    return found


@pytest.fixture
def picture(tmp_path):
    """(path, pixels) of a PNG file."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", pixels


# ----------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_lines_are_appended(run):
    write(run, LINES[:2])
    write(run, LINES[2:])
    assert read_jsonl(run / "metrics.jsonl") == LINES
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_numbers_are_found_in_nested_dicts():
    nested = {"a": 1, "b": {"c": 2.5, "d": {"e": -1}}, "f": "text", "g": None, "h": [1]}
    assert flatten(nested) == {"a": 1, "b/c": 2.5, "b/d/e": -1}


# ----------------------------------------------------------------------------------------------------------
# TensorBoard, by what its server would show


def tensorboard(run):
    """tag -> [(step, number or PNG file)]"""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    shown = {}
    for tag in events.Tags()["tensors"]:
        values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        shown[tag] = [(step, value.item() if value.ndim == 0 else value[2]) for step, value in values]
    return shown


def same_numbers(shown, expected):
    assert shown.keys() == expected.keys()
    for tag, values in expected.items():
        assert [step for step, _ in shown[tag]] == [step for step, _ in values], tag
        # TensorBoard keeps float32
        assert [v for _, v in shown[tag]] == [float(np.float32(v)) for _, v in values], tag


def test_tensorboard_shows_the_numbers_of_the_file(run):
    write(run, LINES, "tensorboard")
    assert len(points(run)) == 7
    same_numbers(tensorboard(run), points(run))


def test_tensorboard_has_a_line_as_soon_as_it_is_written(run):
    log = Log(run, Config(log_to=["tensorboard"]))  # not closed: the run might be killed now
    for line in LINES[:3]:
        log.write(line)
        same_numbers(tensorboard(run), points(run))
    log.close()


def test_a_resumed_run_shows_nothing_twice_on_tensorboard(run):
    write(run, LINES, "tensorboard")
    go_on_at_step_4(run, "tensorboard")
    shown = tensorboard(run)
    same_numbers(shown, points(run))
    assert shown["grpo/reward"][3:] == [(4, -1.0), (5, -1.0), (6, -1.0)]
    assert len(shown["sft/loss"]) == 4 and len(shown["eval/m_vIoU"]) == 1


def test_tensorboard_shows_the_picture_also_of_a_resumed_run(run, picture):
    image = pytest.importorskip("PIL.Image")
    path, pixels = picture
    with contextlib.closing(Log(run, Config(log_to=["tensorboard"]))) as log:
        log.write(LINES[0])
        logs.answers_path(run, 0).parent.mkdir()
        path.rename(logs.answers_path(run, 0))
        log.picture("eval/answers", logs.answers_path(run, 0), 0)
    for _ in range(2):
        ((step, png),) = tensorboard(run)["eval/answers"]
        assert step == 0 and (np.asarray(image.open(io.BytesIO(png))) == pixels).all()
        write(run, [], "tensorboard")


# ----------------------------------------------------------------------------------------------------------
# Weights & Biases, offline, by its own files


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_records(path):
    """The records of a .wandb file, which is a log as LevelDB writes it: blocks of 32 KiB of fragments, each
    after its checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # no room for another fragment
            position += 2**15 - position % 2**15
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(message))
            message = b""
    return records


def wandb_starts(run):
    """For each start of the run, in their order, its records by kind."""
    import wandb

    wandb.teardown()  # it writes the end of its files in a process of its own
    paths = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    starts = []
    for path in paths:
        kinds = {}
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        starts.append(kinds)
    return starts


def wandb_rows(records):
    rows = []
    for row in records["history"]:
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        rows.append({k: v for k, v in items.items() if k not in ("_timestamp", "_runtime")})
    return rows


def expected_rows(run):
    lines = read_jsonl(run / "metrics.jsonl")
    return [{**tags(line), "step": line["step"], "_step": n} for n, line in enumerate(lines)]


def test_wandb_gets_the_numbers_of_the_file(run, offline):
    write(run, LINES, "wandb")
    (records,) = wandb_starts(run)
    assert wandb_rows(records) == expected_rows(run)
    (start,) = records["run"]
    assert (start.project, start.display_name, start.run_id) == (
        "stvg-o1",
        "run",
        (run / "wandb_id").read_text(),
    )
    settings = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert settings["num_generations"] == 8 and settings["sft"]["batch_size"] == 32
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in records["metric"]}
    assert axes["*"] == "step"
    assert records["exit"][0].exit_code == 0


def test_a_resumed_run_shows_nothing_twice_on_wandb(run, offline):
    """`wandb sync` replaces a run by the later files of the same id, so those must hold all of it."""
    write(run, LINES, "wandb")
    first = (run / "wandb_id").read_text()
    time.sleep(1.1)  # wandb names its folders by the second
    go_on_at_step_4(run, "wandb")
    before, after = wandb_starts(run)
    assert {start["run"][0].run_id for start in (before, after)} == {first}
    assert len(wandb_rows(before)) == 11 and wandb_rows(after) == expected_rows(run)
    assert [row["grpo/reward"] for row in wandb_rows(after)[8:]] == [-1.0] * 3


def test_wandb_gets_the_picture_in_the_row_of_its_evaluation(run, offline, picture):
    image = pytest.importorskip("PIL.Image")
    path, pixels = picture
    with contextlib.closing(Log(run, Config(log_to=["wandb"]))) as log:
        log.write(LINES[0])
        log.picture("eval/answers", path, 0)
        log.write(LINES[1])
    first, second = wandb_rows(wandb_starts(run)[0])
    assert first["eval/answers/_type"] == "image-file"
    (file,) = run.glob(f"wandb/offline-run-*/files/{first['eval/answers/path']}")
    numbers = {tag: number for tag, number in first.items() if not tag.startswith("eval/answers")}
    assert [numbers, second] == expected_rows(run)
    assert (np.asarray(image.open(file)) == pixels).all()


def test_wandb_knows_a_run_that_failed(run, offline):
    with (
        pytest.raises(FloatingPointError),
        contextlib.closing(Log(run, Config(log_to=["wandb"]))) as log,
    ):
        log.write(LINES[0])
        raise FloatingPointError
    (records,) = wandb_starts(run)
    assert records["exit"][0].exit_code == 1 and wandb_rows(records) == expected_rows(run)


def test_wandb_without_a_key(run):
    pytest.importorskip("wandb")
    start = "import pathlib, logs, config\n"
    start += f"logs.Log(pathlib.Path({str(run)!r}), config.Config(log_to=['wandb']))"
    unset = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HOME": str(run), "NETRC": str(run / "none"), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", start]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    message = done.stderr.strip().split("\n")[-1]
    assert message.startswith("config.ConfigError: log_to: wandb: No API key configured.")
    assert message.endswith("; wandb login, or set WANDB_MODE=offline")


def test_both_trackers(run, offline):
    write(run, LINES, "wandb", "tensorboard")
    same_numbers(tensorboard(run), points(run))
    assert wandb_rows(wandb_starts(run)[0]) == expected_rows(run)


# ----------------------------------------------------------------------------------------------------------
# Packages that are not installed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = f"^log_to: {name} is not installed; pip install {name}, or leave it out$"
    with pytest.raises(ConfigError, match=message):
        Log(run, Config(log_to=[name]))
    assert list(run.iterdir()) == []
    check_trackers(Config())


def test_a_folder_of_the_trackers_name_is_not_the_tracker(run, monkeypatch):
    class Folder:
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, None, is_package=True) if name == "wandb" else None

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Folder, *sys.meta_path])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_trackers(Config(log_to=["wandb"]))


# ----------------------------------------------------------------------------------------------------------
# Sheets of answers


def test_the_sheet_of_an_evaluation_is_sent(tmp_path):
    pytest.importorskip("matplotlib")
    from test_pictures import make_run

    run = make_run(tmp_path, videos=2)
    (run / "predictions.jsonl").rename(run / "predictions_5.jsonl")
    with contextlib.closing(Log(run, Config(log_to=["tensorboard"]))) as log:
        send_answers(log, "predictions_5.jsonl", 5)
    ((step, png),) = tensorboard(run)["eval/answers"]
    assert step == 5 and png.startswith(b"\x89PNG")
    assert (run / "pictures" / "answers_5.png").is_file()


def test_no_sheet_without_a_tracker(tmp_path):
    log = Log(tmp_path, Config())
    send_answers(log, "predictions.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_that_cannot_be_drawn_is_said_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from test_pictures import make_run

    run = make_run(tmp_path, videos=1)
    record = {"id": "0.y4m", "completion": "", "unreadable": "no such file"}
    write_jsonl([record], run / "predictions.jsonl")
    with contextlib.closing(Log(run, Config(log_to=["tensorboard"]))) as log:
        for step in (5, 10):
            send_answers(log, "predictions.jsonl", step)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        for step in (15, 20):
            send_answers(log, "predictions.jsonl", step)
    assert capsys.readouterr().out == (
        f"no sheet of answers: {run}/predictions.jsonl: holds no answers; write it again with evaluate.py\n"
        "no sheets of answers for the trackers: pip install -r requirements-dev.txt\n"
    )
    assert not (run / "pictures").exists()


def test_pictures_that_cannot_be_drawn_end_no_run(tmp_path):
    """Such as those of a run whose annotations have gone: all else is done."""
    pytest.importorskip("matplotlib")
    from test_pictures import make_run

    run = make_run(tmp_path, videos=1)
    annotations = Path(load_config(run / "config.yaml").eval_annotations)
    annotations.unlink()
    assert draw_pictures(run).startswith(f"no pictures: {annotations}: ")


# ----------------------------------------------------------------------------------------------------------
# Time and memory


def test_the_parts_of_a_step_and_the_whole():
    clock = Clock()
    began = time.perf_counter()
    clock.lap()
    with clock("rollout"):
        time.sleep(0.05)
    with clock("rollout"):
        time.sleep(0.05)
    with clock("update"):
        time.sleep(0.02)
    time.sleep(0.1)  # in no part
    seconds = clock.lap()
    took = time.perf_counter() - began
    assert list(seconds) == ["decode", "rollout", "score", "reference", "update", "wait", "step"]
    assert seconds["rollout"] >= 0.1 and seconds["update"] >= 0.02
    assert sum(seconds[part] for part in PARTS) + 0.1 <= seconds["step"] <= took
    assert seconds["decode"] == seconds["score"] == seconds["reference"] == seconds["wait"] == 0.0


def test_a_part_within_another_counts_once():
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.03)
        with clock("decode"):
            time.sleep(0.2)
            with clock("decode"), clock("wait"):
                time.sleep(0.02)
        time.sleep(0.03)
    seconds = clock.lap()
    assert seconds["rollout"] >= 0.06 and seconds["decode"] >= 0.2 and seconds["wait"] >= 0.02
    assert seconds["rollout"] < 0.2  # not what went to decode
    # All of the step is within a block but for the microseconds around it.
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["step"], abs=0.01)


def test_steps_divide_the_time():
    clock = Clock()
    began = time.perf_counter()
    clock.lap()
    steps = []
    with contextlib.suppress(KeyError), clock("update"):
        for _ in range(3):
            time.sleep(0.02)
            steps.append(clock.lap())  # also within a block
        raise KeyError
    with clock("score"):
        pass
    last = clock.lap()
    took = time.perf_counter() - began
    assert all(step["update"] == step["step"] >= 0.02 for step in steps[1:])
    assert last["update"] < 0.02  # the block has ended, although by an error
    whole = sum(step["step"] for step in [*steps, last])
    assert 0.06 <= whole <= took and whole == pytest.approx(took, abs=0.02)


def test_a_part_that_is_none():
    with pytest.raises(ValueError, match="'sampling' is not one of decode, rollout"), Clock()("sampling"):
        pass


def test_peak_memory_stays_at_the_peak():
    start = "import logs, numpy\nprint(logs.peak_memory())\n"
    start += "block = numpy.ones(200_000_000, numpy.uint8)\nprint(logs.peak_memory())\n"
    start += "del block\nprint(logs.peak_memory())"
    # This process holds more than the other does at its start: that must not be taken for its peak.
    ballast = np.ones(600_000_000, np.uint8)
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True, check=True)
    del ballast
    before, peak, after = map(float, done.stdout.split())
    assert 0.05 < before < 0.6
    assert peak - before == pytest.approx(0.2, abs=0.01) and after == pytest.approx(peak, abs=0.01)


# ----------------------------------------------------------------------------------------------------------
# Reward and vIoU


def test_drift_by_hand():
    """Straight lines have no error; nothing is said before DRIFT_LEAST steps."""
    up, down = np.arange(30) / 10, 1 - np.arange(30) / 100
    assert drifts_apart([*zip(up, down, strict=True)])
    assert not drifts_apart([*zip(up, up, strict=True)])  # as it should be
    assert not drifts_apart([*zip(down, down, strict=True)])
    assert not drifts_apart([*zip(down, up, strict=True)])
    assert drifts_apart([*zip(up, down, strict=True)][:15])
    assert not drifts_apart([*zip(up, down, strict=True)][:14])
    level = [(k / 7, k / 11) for k in range(1000)]
    assert not any(drifts_apart([pair] * count) for pair in level for count in (15, 22, 30))  # but rounding
    assert not drifts_apart([])


def test_drift_against_polyfit():
    """Slopes and standard errors of a second implementation; noise of all sizes, for both answers."""
    rng, answers = np.random.default_rng(0), []
    for n in range(300):
        steps = np.arange(15 + n % 16)
        values = np.stack([0.02 * steps, -0.02 * steps], 1) + rng.normal(
            0, 0.5 * rng.random(), (len(steps), 2)
        )
        lines = [np.polyfit(steps, column, 1, cov=True) for column in values.T]
        (reward, of_reward), (viou, of_viou) = [(line[0], np.sqrt(cov[0, 0])) for line, cov in lines]
        answers.append(drifts_apart([*map(tuple, values)]))
        assert answers[-1] == (reward > 2 * of_reward and viou < -2 * of_viou)
    assert 30 < sum(answers) < 270


def test_drift_is_seldom_seen_in_noise():
    rng = np.random.default_rng(1)
    assert sum(drifts_apart([*map(tuple, rng.normal(size=(30, 2)))]) for _ in range(1000)) < 10
