"""Rewards of one's own: from a file to the total, what is wrong with one, and a run that it ends."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import train
from config import Config, ConfigError, load_config
from prompts import Answer, format_answer
from rewards import TERMS, check_weights, load_file, load_function, load_plugins, plugins, score, terms_of
from runtime import logs
from runtime.files import UserError
from runtime.fingerprints import rewards_fingerprint, settings_of
from samples import Truth

ROOT = Path(__file__).resolve().parent.parent.parent
# Two steps; boxes of an eighth of the frame, drafts of half that.
BOX, HALF = (0, 0, 500, 250), (0, 0, 250, 250)
ANSWER = Answer(4, 5, ((4, HALF), (5, HALF)), ((4, BOX), (5, BOX)))
TRUTH = Truth((4, 5), {4: (0.0, 0.0, 0.5, 0.25), 5: (0.0, 0.0, 0.5, 0.25)})
# The draft: IoU 1/2, GIoU 1/2, L1 1/4; the final boxes: R_spa 1. The paper's total is 3 + 1/4 + 1 + 3/8.
PAPER = 4.625


@pytest.fixture
def plugin(tmp_path):
    """A function that writes a file of rewards and returns FILE.py:f."""

    def write(body, name="mine.py"):
        path = tmp_path / name
        path.write_text(f"import math\nfrom rewards import iou\n\ndef f(answer, truth):\n    {body}\n")
        return f"{path}:f"

    return write


def test_it_sees_what_the_built_in_rewards_see(plugin):
    seen = "answer.span, answer.think_boxes[4], answer.pred_boxes, answer.think, truth.span, truth.boxes[5]"
    name = plugin(f"f.seen = {seen}; return iou(answer.think_boxes[4], truth.boxes[4])")
    scored = score(format_answer(ANSWER), TRUTH, weights={name: 3.0})
    assert scored.rewards[name] == 0.5 and scored.fault == ""
    assert scored.rewards["total"] == pytest.approx(PAPER + 3 * 0.5, abs=1e-12)
    assert list(scored.rewards) == [*TERMS, name, "total"] == [*terms_of({name: 3.0}), "total"]
    half, box = (0, 0, 0.25, 0.25), (0, 0, 0.5, 0.25)
    pred, think = {4: box, 5: box}, ((4, half), (5, half))
    assert load_function(name).seen == ((4, 5), half, pred, think, (4, 5), box)


def test_weight_zero_is_only_watched_and_no_answer_scores_nothing(plugin):
    name = plugin("return 7")
    watched = score(format_answer(ANSWER), TRUTH, weights={name: 0})
    assert watched.rewards[name] == 7.0 and watched.rewards["total"] == pytest.approx(PAPER, abs=1e-12)
    assert set(score("no answer", TRUTH, weights={name: 9}).rewards.values()) == {0.0}


def test_the_example_by_hand():
    """Of the union of [4, 5] and [5, 8], five steps, one is common; there the box is half of the truth."""
    name = f"{ROOT}/examples/viou.py:viou"
    answer = Answer(4, 5, None, ((4, BOX), (5, HALF)))
    truth = Truth((5, 8), dict.fromkeys(range(5, 9), (0.0, 0.0, 0.5, 0.25)))
    scored = score(format_answer(answer), truth, weights={name: 1}, think=False)
    assert scored.rewards[name] == pytest.approx(0.5 / 5, abs=1e-12) == scored.diagnostics["viou_pred"]


FAULTS = {
    "raises": ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(line 5\)"),
    "nan": ("return math.nan", r"the reward .*mine\.py:f is nan"),
    "too large": ("return 1e308 * 1e10", r"the reward .*mine\.py:f is inf"),
    "nothing": ("pass", r"raised TypeError: float\(\) argument must be"),
    "a word": ("return 'high'", r"raised ValueError: could not convert string to float: 'high'"),
    "ends": ("raise SystemExit(3)", r"raised SystemExit: 3 \(line 5\)"),
}


@pytest.mark.parametrize("body, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_names_the_reward_and_the_answer(plugin, body, message):
    """score itself raises nothing: all ranks of a run must come to the same end."""
    completion = format_answer(ANSWER)
    scored = score(completion, TRUTH, weights={plugin(body): 1.0})
    assert re.search(message, scored.fault)
    assert scored.fault.endswith(f"; the answer was {completion!r}") and "\n" not in scored.fault
    assert not math.isfinite(scored.rewards["total"])


def test_what_is_wrong_with_a_name(plugin, tmp_path):
    """Its form is checked with the other settings; the file, where it is loaded: what was set can be read
    without it."""
    good = plugin("return 0.0")
    assert plugins(check_weights({good: 2})) == (good,)
    load_plugins({good: 2, "think": 1, plugin("return 0.0", "a:b.py"): 1})
    for name in ("smoothness", "mine.py", "mine:f", "mine.py:", "mine.py:f-g"):
        with pytest.raises(ValueError, match=r"^rewards: there is no weight .*, or for FILE\.py:FUNCTION$"):
            check_weights({name: 1.0})
    wrong = {
        f"{tmp_path}/absent.py:f": "there is no file /.*absent.py; correct the path",
        good.replace(":f", ":g"): "mine.py has no function 'g'; write FILE.py:FUNCTION",
        good.replace(":f", ":math"): "mine.py has no function 'math'",
        plugin("return (", "broken.py"): r"broken.py cannot be loaded: SyntaxError: .*; correct it",
        plugin("pass\n1 / 0", "fails.py"): r"fails.py cannot be loaded: ZeroDivisionError: .* \(line 6\);",
        plugin("pass\nraise SystemExit(3)", "ends.py"): "ends.py cannot be loaded: SystemExit: 3",
    }
    for name, message in wrong.items():
        assert check_weights({name: 1.0})[name] == 1.0
        with pytest.raises(UserError, match=rf"^rewards: .*{message}"):
            load_plugins({name: 1.0})
    with pytest.raises(ValueError, match=r"^rewards: missed_step is -1; write a number from 0"):
        check_weights({"missed_step": -1})


def test_from_a_file_and_from_the_command_line(plugin, tmp_path):
    name = plugin("return 0.0")
    path = tmp_path / "config.yaml"
    path.write_text(f"rewards: {{temporal: 2, {name}: 0.2}}\n")
    config = load_config(path)
    assert config.rewards[name] == 0.2 and config.rewards["temporal"] == 2 and config.rewards["think"] == 0.5
    assert load_config(path, [f"rewards.{name}=1.5", "rewards.think=0"]).rewards[name] == 1.5
    assert load_config(path, [f"rewards.{tmp_path}/gone.py:f=1"]).rewards[f"{tmp_path}/gone.py:f"] == 1
    with pytest.raises(ConfigError, match=r"^command line: rewards: there is no weight 'smooth'"):
        load_config(path, ["rewards.smooth=1"])


def test_a_file_is_run_once_and_may_hold_what_python_files_hold(tmp_path):
    (tmp_path / "two.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nruns = []\nruns.append(1)\n"
        "@dataclass\nclass Seen:\n    count: int = 0\nseen = Seen()\n"
        "def f(answer, truth):\n    seen.count += 1\n    return seen.count\n"
        "def g(answer, truth):\n    return 10 * seen.count + len(runs)\n"
    )
    f, g = f"{tmp_path}/two.py:f", f"{tmp_path}/two.py:g"
    terms = score(format_answer(ANSWER), TRUTH, weights={f: 1, g: 1}).rewards
    assert (terms[f], terms[g]) == (1, 11)


def test_another_text_is_another_reward(plugin, tmp_path):
    """For checkpoints and saved answers what stands in the file counts, as it was when it was loaded: a run
    under way goes on by the function that it has, and says so."""
    name = plugin("return 0.0")
    file = name.removesuffix(":f")
    path = tmp_path / "config.yaml"
    path.write_text(f"rewards: {{{name}: 0.2}}\n")
    before, marks = settings_of(load_config(path)), rewards_fingerprint({name: 1, "think": 1})
    assert list(marks) == [file] and rewards_fingerprint({"think": 1}) == {}
    plugin("return 1.0")
    assert settings_of(load_config(path)) == before
    assert score(format_answer(ANSWER), TRUTH, weights={name: 1}).rewards[name] == 0
    load_file.cache_clear()  # as in another process
    after = settings_of(load_config(path))
    assert {key for key in after if after[key] != before[key]} == {f"rewards.{file}"}


def test_files_of_one_name_are_kept_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"# {folder}")
    weights = {f"{tmp_path}/{folder}/mine.py:f": 1.0 for folder in ("a", "b")}
    run = logs.start_run(Config(output_dir=str(tmp_path / "run"), rewards=weights))
    assert sorted(copy.read_text() for copy in (run / "rewards").iterdir()) == ["# a", "# b"]


# ----------------------------------------------------------------------------------------------------------
# In a run

TINY = {"model": str(ROOT / "checkpoints/toy"), "batch_size": 2, "num_generations": 4, "max_new_tokens": 192}
TINY |= {"time_unit": "second", "eval_limit": 1, "steps": 2}


def test_it_is_logged_like_the_others(plugin, tmp_path, write_config):
    name = plugin("return answer.end - answer.start")
    train.main([write_config(tmp_path, **TINY, rewards={name: 0.25})])
    run = tmp_path / "run"
    (copy,) = (run / "rewards").iterdir()  # for the record
    assert copy.read_bytes() == Path(name.removesuffix(":f")).read_bytes()
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "grpo"]
    assert len(lines) == 2
    for line in lines:
        records = [record for record in rollouts if record["step"] == line["step"]]
        lengths = [r["span"][1] - r["span"][0] if r["span"] else 0 for r in records]
        assert [record["rewards"][name] for record in records] == lengths
        groups = torch.tensor(lengths, dtype=torch.float64).view(2, 4)
        assert line[name] == pytest.approx(float(groups.mean()))
        assert line["std"][name] == pytest.approx(float(groups.std(dim=1).mean()))
        assert list(line["std"]) == [*TERMS, name]
        temporal = torch.tensor([r["rewards"]["temporal"] for r in records], dtype=torch.float64).view(2, 4)
        assert line["std"]["temporal"] == pytest.approx(float(temporal.std(dim=1).mean()))


def test_gauges_follow_from_the_rollouts(tmp_path, write_config):
    """Counted again from what was parsed."""
    settings = {**TINY, "batch_size": 6, "steps": 1}
    train.main([write_config(tmp_path, **settings)])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["phase"] == "grpo"]
    records = [json.loads(text) for text in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    gauges = dict.fromkeys(("overlap", "one_step", "copied", "out_of_frame", "think_gap", "span_ratio"), 0.0)
    for r in records:
        if r["span"] is None:
            continue
        (first, last), (begin, end) = r["span"], r["truth"]["span"]
        steps, true_steps = {*range(first, last + 1)}, {*range(begin, end + 1)}
        boxes = re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", r["completion"])
        width, height = r["scale"]
        out = [int(a) > width or int(c) > width or int(b) > height or int(d) > height for a, b, c, d in boxes]
        gauges["overlap"] += bool(steps & true_steps)
        gauges["one_step"] += len(steps) == 1
        gauges["copied"] += r["think_boxes"] == r["pred_boxes"]
        gauges["out_of_frame"] += sum(out) / len(out)
        gauges["think_gap"] += r["rewards"]["spatial_pred"] - r["rewards"]["spatial_think"]
        gauges["span_ratio"] += len(steps) / len(true_steps)
    assert {name: line[name] for name in gauges} == pytest.approx(
        {name: value / len(records) for name, value in gauges.items()}, abs=1e-9
    )
    assert line["overlap"] > 0.3 and line["drift"] == 0


def test_a_function_that_is_missing_is_said_first(plugin, tmp_path, write_config):
    """Before there is a run."""
    with pytest.raises(UserError, match=r"has no function 'g'"):
        train.main([write_config(tmp_path, **TINY, rewards={plugin("return 0.0").replace(":f", ":g"): 1})])
    assert not (tmp_path / "run").exists()


def test_a_fault_ends_the_run_with_the_answer(plugin, tmp_path, write_config):
    """At its second call: the first is the evaluation before."""
    name = plugin("f.calls = getattr(f, 'calls', 0) + 1; return math.nan if f.calls > 1 else 0.0")
    message = r"^step 1: the reward .*mine\.py:f is nan; the answer was '<time> .*The batch was .*\.y4m"
    with pytest.raises(FloatingPointError, match=message):
        train.main([write_config(tmp_path, **TINY, rewards={name: 1})])


def test_a_fault_in_an_evaluation_names_the_sentence(plugin, tmp_path, write_config):
    name = plugin("return math.nan")
    with pytest.raises(FloatingPointError, match=r"^'.\.y4m': the reward .*is nan; the answer was "):
        train.main([write_config(tmp_path, **TINY, rewards={name: 1})])
