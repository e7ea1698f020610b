"""Rewards of your own: from a file to the total, what is wrong with one, and a run that it ends."""

import re
from pathlib import Path

import pytest
import torch
from tiny_runs import at_call, metrics_of, names, no_pictures, read_lines

import train
from config import Config, load_config
from prompts import Answer, format_answer, parse_answer
from rewards import TERMS, score
from runtime.files import UserError
from runtime.fingerprints import settings_of
from runtime.plugins import (
    FUNCTIONS,
    RewardError,
    load_file,
    load_plugins,
    plugin_fingerprints,
    read_source,
)
from runtime.run import check_start
from samples import Truth

# Two steps; boxes of an eighth of the frame, drafts of half that.
BOX, HALF = (0, 0, 500, 250), (0, 0, 250, 250)
ANSWER = Answer(4, 5, ((4, HALF), (5, HALF)), ((4, BOX), (5, BOX)))
TRUTH = Truth((4, 5), {4: (0.0, 0.0, 0.5, 0.25), 5: (0.0, 0.0, 0.5, 0.25)})
# The draft: IoU 1/2, GIoU 1/2, L1 1/4; the final boxes: R_spa 1. The paper's total is 3 + 1/4 + 1 + 3/8.
PAPER = 4.625


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that writes a file of rewards, below the current directory, and returns FILE.py:f."""
    monkeypatch.chdir(tmp_path)

    def write(body):
        path = tmp_path / "mine.py"
        path.write_text(f"import math\nfrom rewards import iou\n\ndef f(answer, truth):\n    {body}\n")
        return f"{path}:f"

    return write


def test_it_sees_what_the_built_in_rewards_see(plugin):
    seen = "answer.span, answer.think_boxes.get(4), answer.pred_boxes, truth.span, truth.boxes[5]"
    first = "(4, (0, 0, 0, 0))"
    name = plugin(f"f.seen = {seen}; return iou(answer.think_boxes.get{first}, truth.boxes.get{first})")
    load_plugins({name: 1})
    scored = score(format_answer(ANSWER), TRUTH, weights={name: 3.0})
    assert scored.rewards[name] == 0.5 and list(scored.rewards) == [*TERMS, name, "total"]
    assert scored.rewards["total"] == pytest.approx(PAPER + 3 * 0.5, abs=1e-12)
    box = (0, 0, 0.5, 0.25)
    assert FUNCTIONS[name].seen == ((4, 5), (0, 0, 0.25, 0.25), {4: box, 5: box}, (4, 5), box)
    # With weight 0 it is only watched; what is no answer scores nothing.
    watched = score(format_answer(ANSWER), TRUTH, weights={name: 0})
    assert watched.rewards[name] == 0.5 and watched.rewards["total"] == pytest.approx(PAPER, abs=1e-12)
    assert set(score("no answer", TRUTH, weights={name: 9}).rewards.values()) == {0.0}


def test_the_examples_by_hand():
    """Of the union of [4, 5] and [5, 8], five steps, one is common; there the box is half of the truth. So is
    that of step 8, which the answer's span leaves out and its list names."""
    viou, onethinker = "examples/viou.py:viou", "examples/onethinker.py:onethinker"
    guards = {f"examples/guards.py:{name}": 1 for name in ("no_overlap", "missed_steps")}
    load_plugins((weights := {viou: 1, onethinker: 1}) | guards)
    load_plugins(weights | guards, think=False)
    answer = Answer(4, 5, None, ((4, BOX), (5, HALF), (8, BOX)))
    truth = Truth((5, 8), dict.fromkeys(range(5, 9), (0.0, 0.0, 0.5, 0.25)))
    scored = score(format_answer(answer), truth, weights=weights, think=False)
    assert scored.rewards[viou] == pytest.approx(0.5 / 5, abs=1e-12) == scored.diagnostics["viou_pred"]
    assert scored.rewards[onethinker] == pytest.approx(0.5 * 1 / 5 + 0.5 * (0.5 + 1) / 2, abs=1e-12)
    elsewhere = format_answer(Answer(20, 21, None, ((20, BOX),)))
    assert score(elsewhere, truth, weights=weights, think=False).rewards[onethinker] == 0


FAULTS = {
    "1 / 0": r"raised ZeroDivisionError: division by zero \(line 5\)",
    "math.nan": r"the reward .*mine\.py:f is nan",
    "None": r"raised TypeError: float\(\) argument must be",
    "exit(3)": r"raised SystemExit: 3 \(line 5\)",
}


@pytest.mark.parametrize("value", FAULTS)
def test_a_fault_names_the_reward_and_the_answer(plugin, value):
    """Also on an answer that it was not tried on."""
    completion = format_answer(ANSWER)
    load_plugins(weights := {plugin(f"return {value} if answer.span == (4, 5) else 0"): 1.0})
    with pytest.raises(RewardError, match=FAULTS[value]) as caught:
        score(completion, TRUTH, weights=weights)
    assert str(caught.value).endswith(f"; the answer was {completion!r}") and "\n" not in str(caught.value)


PRED, EACH = "answer.pred_boxes", "for x1, y1, x2, y2 in answer.pred_boxes.values()"
CARELESS = [  # a reward, the first answer that it fails on, and how
    ("return 1 / 0", "an ordinary answer", "ZeroDivisionError: division by zero"),
    ("return math.nan * exit()", "an ordinary answer", "SystemExit: None"),
    ("pass", "an ordinary answer", "TypeError: float() argument must be"),
    ("return 1 / (answer.think != answer.pred)", "the true boxes in both lists", "ZeroDivisionError"),
    (f"x = [x1 {EACH}]; return 1 / (max(x) - min(x))", "the same box in every step", "ZeroDivisionError"),
    (f"return sum(1 / ((x2 - x1) * (y2 - y1)) {EACH})", "a box without area", "ZeroDivisionError"),
    (f"return sum(math.sqrt((x2 - x1) * (y2 - y1)) {EACH})", "a box with a flipped side", "ValueError"),
    (f"return sum(math.sqrt(y2 - y1) {EACH})", "a box with two flipped sides", "ValueError"),
    (f"return sum(math.log(1 - x2) {EACH})", "a box far larger than the frame", "ValueError"),
    (f"return {PRED}[answer.span[0]][0]", "a list without the span's first and last step", "KeyError: 4"),
    (f"return 1 / (4 in {PRED} or 5 in {PRED})", "a list of steps outside the span", "ZeroDivisionError"),
    (
        f"x1, y1, x2, y2 = {PRED}[min({PRED})]; return 1 / (x2 - x1)",
        "boxes without area",
        "ZeroDivisionError",
    ),
    (f"x1, y1, x2, y2 = {PRED}[min({PRED})]; return math.log(x2 - x1)", "boxes without area", "ValueError"),
    (
        f"x = min({PRED}); return math.sqrt({PRED}[x][2] - {PRED}[x][0])",
        "boxes with flipped sides",
        "ValueError",
    ),
    ("return math.sqrt(answer.end - answer.start)", "an empty span", "ValueError"),
    ("return 1 / (answer.end - answer.start + 1)", "an empty span of length 0", "ZeroDivisionError"),
    ("return 1 / (answer.end - answer.start)", "a single step", "ZeroDivisionError"),
    ("return 1 / [1, 1, 1, 1, 1, 1, 1, 1][answer.end]", "a span far beyond the clip", "IndexError"),
    ("return 1 / (answer.start != 8)", "a span that misses the event", "ZeroDivisionError"),
    (
        "return sum(math.log(b - a) for (a, _), (b, _) in zip(answer.pred, answer.pred[1:]))",
        *("steps listed twice and backwards", "ValueError"),
    ),
    (f"return sum(answer.think_boxes[i][0] for i in {PRED})", "a draft of other steps", "KeyError: 6"),
    (
        "x = [box[0] for box in truth.boxes.values()]; return 1 / (max(x) - min(x))",
        *("a truth that stands still", "ZeroDivisionError"),
    ),
    ("return truth.boxes[truth.span[0]][0]", "a truth without a box in some steps", "KeyError: 4"),
    ("return 1 / (truth.span[1] - truth.span[0])", "a truth of one step", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("body", "what", "reason"), CARELESS)
def test_a_careless_reward_is_named_at_the_start(plugin, body, what, reason):
    name = plugin(body)
    with pytest.raises(UserError) as caught:
        check_start(Config(rewards={name: 0.0}))
    said = f"rewards: tried on {what} (training brings such cases): {name} raised {reason}"
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert " (line 5)" in str(caught.value) or body == "pass"
    text = re.search(r"; the answer was '(.*?)'", str(caught.value))[1]
    assert format_answer(parse_answer(text)) == text


def test_what_the_start_says(plugin, tmp_path, grpo_config):
    """In one line, and before all else: no folder is made."""
    name = plugin("return math.inf if answer.end - answer.start > 99 else 1 / (answer.end >= answer.start)")
    with pytest.raises(UserError) as caught:
        train.main([grpo_config(tmp_path, rewards={name: 1.0})])  # which has no thinking boxes
    boxes = "4. [210, 200, 420, 790], 5. [220, 210, 450, 800], 6. [260, 190, 480, 840]"
    boxes += ", 7. [270, 180, 540, 820]"
    assert str(caught.value) == (
        f"rewards: tried on an empty span (training brings such cases): {name} raised ZeroDivisionError:"
        " division by zero (line 5); the answer was '<time> 90 - 3 </time> <pred_bbox> "
        f"{boxes} </pred_bbox>'; it also fails on an empty span of length 0, a span far beyond the clip"
    )
    assert not (tmp_path / "run").exists()


def test_a_reward_is_tried_once_on_answers_as_the_run_has_them(plugin):
    """One that needs thinking boxes is right where there are some. Numbers of numpy are numbers."""
    counts = "import numpy; f.calls = getattr(f, 'calls', 0) + 1"
    name = plugin(f"{counts}; return numpy.float32(len(answer.think)) / len(answer.think_boxes) > 1")
    load_plugins({name: 1})
    assert (calls := FUNCTIONS[name].calls) >= 12
    load_plugins({name: 1})
    assert FUNCTIONS[name].calls == calls
    with pytest.raises(UserError, match=r"tried on an ordinary answer .* '<time> 4 - 7 </time> <pred"):
        load_plugins({name: 1}, think=False)


def test_a_reward_may_do_with_its_boxes_what_it_likes(plugin, tmp_path):
    """The next one gets them whole, and so does the next answer to that sentence."""
    spoils = plugin("answer.pred_boxes.clear(); answer.think_boxes.clear(); truth.boxes.clear(); return 0")
    (tmp_path / "next.py").write_text(
        "def count(answer, truth):\n"
        "    return len(answer.pred_boxes) + 10 * len(answer.think_boxes) + 100 * len(truth.boxes)\n"
    )
    weights = {spoils: 1, f"{tmp_path}/next.py:count": 0}
    load_plugins(weights)
    for _ in range(2):
        terms = score(format_answer(ANSWER), TRUTH, weights=weights).rewards
        assert (terms[f"{tmp_path}/next.py:count"], terms["total"]) == (222, PAPER)


UNLOADABLE = {
    "return (": r"mine\.py cannot be loaded: SyntaxError: .*; correct it",
    "pass\n1 / 0": r"mine\.py cannot be loaded: ZeroDivisionError: .* \(line 6\)",
    "pass\ndel f": r"mine\.py has no function 'f'; write FILE\.py:FUNCTION",
}


@pytest.mark.parametrize("body", UNLOADABLE)
def test_what_cannot_be_loaded(plugin, body):
    with pytest.raises(UserError, match=f"^rewards: .*{UNLOADABLE[body]}"):
        load_plugins({"think": 1, plugin(body): 1.0})


def test_a_file_is_run_once_and_may_hold_what_python_files_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Seen:\n    count: int = 0\nseen = Seen()\n"
        "def f(answer, truth):\n    seen.count += 1\n    return seen.count\n"
        "def g(answer, truth):\n    return 10 * seen.count\n"
    )
    names = [f"{tmp_path}/two.py:{name}" for name in "fg"]
    load_plugins(weights := dict.fromkeys(names, 1))
    first = score(format_answer(ANSWER), TRUTH, weights=weights).rewards[names[0]]
    terms = score(format_answer(ANSWER), TRUTH, weights=weights).rewards
    assert [terms[name] for name in names] == [first + 1, 10 * (first + 1)]


def test_another_text_is_another_reward(plugin, tmp_path):
    """A checkpoint belongs to the text of the file as it was loaded: a running process keeps its function."""
    name, path = plugin("return 0.0"), tmp_path / "config.yaml"
    path.write_text(f"rewards: {{{name}: 0.2}}\n")
    load_plugins({name: 1})
    before = settings_of(load_config(path))
    plugin("return 1.0")
    assert settings_of(load_config(path)) == before
    assert score(format_answer(ANSWER), TRUTH, weights={name: 1}).rewards[name] == 0
    read_source.cache_clear()  # as in another process
    load_file.cache_clear()
    after = settings_of(load_config(path))
    assert {key for key in after if after[key] != before[key]} == {f"rewards.{name.removesuffix(':f')}"}


def test_only_files_below_the_current_directory(plugin, tmp_path, monkeypatch):
    """Not above it, not beside it, not through a link; a text that is not run has a fingerprint all the same,
    and a reward that is not loaded is left out of the total."""
    here = tmp_path / "here"
    here.mkdir()
    name = plugin("return 9.0").removeprefix(f"{tmp_path}/")
    fingerprint = plugin_fingerprints({name: 1})
    monkeypatch.chdir(here)
    (here / "link.py").symlink_to(tmp_path / "mine.py")
    (here / "linked").symlink_to(tmp_path)
    (here / "pipe.py").symlink_to("/dev/stdin")
    for outside in (f"../{name}", f"{tmp_path}/{name}", f"x/../../{name}", "link.py:f", f"linked/{name}"):
        with pytest.raises(UserError, match=r"^rewards: .* is not below the current directory"):
            load_plugins({outside: 1.0})
        assert [*plugin_fingerprints({outside: 1}).values()] == ["missing"]
    assert plugin_fingerprints({"pipe.py:f": 1, "no.py:f": 1}) == {"no.py": "missing", "pipe.py": "missing"}
    (here / "mine.py").write_bytes((tmp_path / "mine.py").read_bytes())
    read_source.cache_clear()
    assert plugin_fingerprints({name: 1}) == fingerprint and len(fingerprint["mine.py"]) == 12
    assert score(format_answer(ANSWER), TRUTH, weights={name: 1}).rewards["total"] == PAPER
    load_plugins({name: 1})
    assert score(format_answer(ANSWER), TRUTH, weights={name: 1}).rewards["total"] == PAPER + 9


def test_in_a_run(plugin, tmp_path, grpo_config):
    """A reward that fails ends the run with its name, line and answer, and leaves the weights from before the
    step. Mended, it resumes. It is logged like the others, and a copy of its file is kept."""
    fault = tmp_path / "fault"
    name = plugin(f"import os; assert not os.path.exists({str(fault)!r}); return answer.end - answer.start")
    path, run = grpo_config(tmp_path, rewards={name: 0.25}, eval_every=0, eval_limit=1), tmp_path / "run"
    said = r"after step 2: .*mine\.py:f raised Asser.* \(line 5\); the answer was '.* batch was .\.y4m"
    with no_pictures():
        with at_call(train, "sample_answers", 3, fault.touch), pytest.raises(FloatingPointError, match=said):
            train.main([path])
        assert names(run, "checkpoint") == {"checkpoint_2"}
        fault.unlink()
        train.main([path, "resume=auto"])
    (copy,) = (run / "rewards").iterdir()
    assert copy.read_bytes() == Path(name.removesuffix(":f")).read_bytes()
    records = read_lines(run / "rollouts.jsonl")
    assert len(records) == 4 * 8
    for line in metrics_of(run, "grpo"):
        step = [record for record in records if record["step"] == line["step"]]
        lengths = [r["span"][1] - r["span"][0] if r["span"] else 0 for r in step]
        assert [record["rewards"][name] for record in step] == lengths
        for term, values in {name: lengths, "temporal": [r["rewards"]["temporal"] for r in step]}.items():
            groups = torch.tensor(values, dtype=torch.float64).view(2, 4)
            assert line[term] == pytest.approx(float(groups.mean()))
            assert line["std"][term] == pytest.approx(float(groups.std(dim=1).mean()))
        assert list(line["std"]) == [*TERMS, name]
