"""The bench: lines in, lines with rewards out, what each term does, faults named, the page."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from browser import look, open_browser
from hypothesis import assume, given
from hypothesis import strategies as st
from test_rewards import AWAY, GOOD, RIGHT, TABLE, TRUTH, steps, text

import rewards
from config import Config, ConfigError
from lab import bench
from lab.bench import HEADS, LEGEND, group_key, ranks, shares_of, spearman
from prompts import parse_answer
from rewards import TERMS, WEIGHTS, score
from runtime.files import DataError, UserError
from samples import Truth

ROOT = Path(__file__).resolve().parent.parent.parent
WRONG = steps(4, 7, AWAY)  # the boxes of another person


def run_bench(*arguments):
    command = [sys.executable, str(ROOT / "rewards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def line(completion, **more):
    boxes = {str(step): list(box) for step, box in TRUTH.boxes.items()}
    return {"completion": completion, "truth": {"span": [4, 7], "boxes": boxes}} | more


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def bench_of(path, records, capsys, *arguments):
    """The lines that the bench puts out, and its summary."""
    bench.main([str(write(path, records)), *arguments])
    captured = capsys.readouterr()
    return [json.loads(text) for text in captured.out.splitlines()], captured.err


def read_table(summary):
    """The table of a summary: term -> column -> number, or None for "-"."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in summary.splitlines()]
    start = lines.index(list(HEADS))
    rows = {}
    for name, *cells in lines[start + 1 :]:
        if len(cells) == len(HEADS) - 1:
            numbers = [None if cell == "-" else float(cell) for cell in cells]
            rows[name] = dict(zip(HEADS[1:], numbers, strict=True))
    return rows


# ----------------------------------------------------------------------------------------------------------
# Lines


def test_bench_adds_the_rewards_to_every_line(tmp_path):
    completions = [entry[0] for entry in TABLE.values()]
    records = [line(c, id=f"clip {k}", extra={"ü": [1, None, 0.1]}) for k, c in enumerate(completions)]
    without = "<time> 4 - 4 </time> <pred_bbox> 4. [200, 200, 400, 600] </pred_bbox>"
    records += [line(without, think=False), line(text(4, 7, RIGHT).replace("200", "400"), scale=[2000, 1000])]
    records += [line("\ud800 \u2028 lone surrogate", rewards="replaced")]
    run = run_bench(write(tmp_path / "answers.jsonl", records))
    assert run.returncode == 0
    output = [json.loads(text) for text in run.stdout.splitlines()]
    assert len(output) == len(records)
    for record, result in zip(records, output, strict=True):
        added = result.pop("rewards")
        assert result == {key: value for key, value in record.items() if key != "rewards"}
        assert list(added) == [*TERMS, "total"]
        expected = score(
            record["completion"],
            TRUTH,
            tuple(record.get("scale", (1000, 1000))),
            think=record.get("think", True),
        )
        assert added == expected.rewards
    parsed = sum(
        score(record["completion"], TRUTH, think=record.get("think", True)).answer is not None
        for record in records
    )
    assert f"{len(records)} answers, {parsed} of them parse; 0 groups" in run.stderr
    assert list(read_table(run.stderr)) == [*TERMS, "total"]


def test_bench_reads_an_empty_file_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    empty = run_bench(path)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert empty.stderr == "0 answers, 0 of them parse; 0 groups\n"
    path.write_text(json.dumps(line(text(4, 7, RIGHT))))
    assert json.loads(run_bench(path).stdout)["rewards"]["total"] == 5.0


def test_advantages_of_groups(tmp_path, capsys):
    """Totals 5, 2 and 2: mean 3, sample deviation sqrt(3); of two, 5 and 2: deviation 3 / sqrt(2)."""
    right, evading = text(4, 7, RIGHT), text(10, 12, steps(10, 12, AWAY))  # 5 and 2
    records = [line(right, step=1, id="a"), line(evading, step=1, id="b"), line(evading, step=1, id="a")]
    records += [line(right, step=1, id="b"), line(right, step=2, id="a", advantage=9.0)]
    records += [line(evading, step=1, id="a"), line(right), line(right, step=1)]
    records += [line(evading, id="a"), line(evading, id="a")]  # as predictions, but twice the same
    output, summary = bench_of(tmp_path / "answers.jsonl", records, capsys)
    a, b = 3**0.5 + 1e-6, 3 / 2**0.5 + 1e-6
    expected = [2 / a, -1.5 / b, -1 / a, 1.5 / b, None, -1 / a, None, None, 0.0, 0.0]
    for result, advantage in zip(output, expected, strict=True):
        assert result.get("advantage") == (advantage if not advantage else pytest.approx(advantage))
    assert "10 answers, 10 of them parse; 3 groups" in summary
    config = tmp_path / "config.yaml"
    config.write_text("scale_rewards: false\n")
    output, _ = bench_of(tmp_path / "answers.jsonl", records, capsys, "--config", str(config))
    plain = [2, -1.5, -1, 1.5, None, -1, None, None, 0, 0]
    assert [result.get("advantage") for result in output] == plain


def test_groups_are_equal_steps_and_ids():
    same = [{"step": None, "id": "1"}, {"id": "1", "length": 3}]  # 1 is not "1", and no step is not step 1
    records = [{"step": 1, "id": 1}, {"step": 1, "id": "1"}, {"step": 2, "id": 1}, {"id": 1}, *same]
    keys = [group_key(record) for record in records]
    assert len(set(keys)) == 5 and keys[-2] == keys[-1]


def test_both_readings_see_the_same_lines(tmp_path):
    """A run may add lines, one of them half written, between the two readings."""
    config = Config()
    path = write(tmp_path / "rollouts.jsonl", [line(text(4, 7, RIGHT), id="a"), line("no", id="a")])
    with bench.open_answers(str(path)) as file:
        scored = bench.score_file(file, config)
        with path.open("a") as more:
            more.write(json.dumps(line("no", id="a")) + '\n{"completion')
        output = [json.loads(text) for text in bench.output_lines(file, scored)]
        page = bench.draw_page(file, scored, bench.term_table(scored, config.rewards), config)
    assert [result["rewards"]["total"] for result in output] == [5, 0]
    assert page.count('class="tubes"') == 2


def test_a_pipe_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # as `python rewards.py <(zcat ...)` would
    with pytest.raises(DataError, match="pipe: is read twice, which a pipe cannot be; write it to a file"):
        bench.main([str(pipe)])
    os.close(writer)


def test_what_is_kept_of_an_answer_is_its_numbers(tmp_path):
    """Neither reading holds even a quarter of the file."""
    record = line("no" * 50000, id="a")
    path = write(tmp_path / "answers.jsonl", (record for _ in range(200)))
    tracemalloc.start()
    with bench.open_answers(str(path)) as file:
        scored = bench.score_file(file, Config())
        written = sum(len(text) for text in bench.output_lines(file, scored))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written > path.stat().st_size > 2e7 > 4 * peak


# ----------------------------------------------------------------------------------------------------------
# What the terms do


def test_ranks_and_their_correlation_by_hand():
    assert ranks(np.array([30.0, 10.0, 20.0, 10.0])).tolist() == [4, 1.5, 3, 1.5]
    assert ranks(np.array([0.3, 0.1 + 0.2, 0.0])).tolist() == [2.5, 2.5, 1]  # equal but for rounding
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert spearman(np.array([1, 2, 3, 4]), np.array([0.1, 0.3, 0.2, 0.9])) == pytest.approx(0.8)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4, less 2.5: products 2.25 + 2.25, squares 4.5 and 5
    assert spearman(np.array([0, 1, 1, 7]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None
    assert spearman(np.array([1.0]), np.array([1.0])) is None


@given(st.permutations(range(8)), st.permutations(range(8)))
def test_the_correlation_by_the_formula_of_squared_differences(a, b):
    """Without ties: 1 - 6 sum(d^2) / (n (n^2 - 1))."""
    expected = 1 - Fraction(6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)), 8 * 63)
    p, q = np.array(a) ** 3 / 7, np.exp(np.array(b))  # ranks do not mind what is monotonic
    assert spearman(p, q) == pytest.approx(float(expected), abs=1e-12)


values_of_a_group = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(np.array)


@given(*[values_of_a_group] * len(TERMS), st.floats(0, 2))
def test_shares_add_up_to_one(format_, consistency, temporal, think_boxes, pred_boxes, think, spatial):
    """The total is linear in the terms, and so is the covariance with it."""
    columns = (format_, consistency, temporal, think_boxes, pred_boxes, think)
    values = dict(zip(TERMS, columns, strict=True))
    weights = {**WEIGHTS, "spatial": spatial, "temporal": -0.5}
    values["total"] = format_ + consistency - temporal / 2 + spatial * (think_boxes + pred_boxes) + think / 2
    groups = [[0, 1], [3, 2]]
    assume(max(np.var(values["total"][group]) for group in groups) > 1e-6)
    shares, decides = shares_of(values, groups, weights)
    assert list(shares) == list(decides) == list(TERMS)
    assert sum(shares.values()) == pytest.approx(1) == sum(decides.values())


def test_shares_by_hand():
    """Two groups of two, whose spreads are differences, and one without any.

    Group 1: temporal 1 and 0, thinking boxes 0 and 0.5: total 1 and 0.5. Of 0.5 * 0.5 temporal has 1 * 0.5,
    the thinking boxes -0.5 * 0.5. Group 2: both lists 0.5 and 0, total 1 and 0: of 1 * 1 each has 0.5 * 1.
    """
    zeros = np.zeros(6)
    values = {
        **dict.fromkeys(TERMS, zeros),
        "temporal": np.array([1, 0, 0, 0, 2, 2.0]),
        "spatial_think": np.array([0, 0.5, 0.5, 0, 0, 0]),
        "spatial_pred": np.array([0, 0, 0.5, 0, 0, 0]),
    }
    values["total"] = values["temporal"] + values["spatial_think"] + values["spatial_pred"]
    shares, decides = shares_of(values, [[0, 1], [2, 3], [4, 5]], WEIGHTS)
    expected = {"temporal": 0.5 / 1.25, "spatial_think": 0.25 / 1.25, "spatial_pred": 0.5 / 1.25}
    assert shares == pytest.approx(dict.fromkeys(TERMS, 0.0) | expected)
    # temporal decides the first group; the second is shared by two equals; the third has no order
    equals = {"temporal": 0.5, "spatial_think": 0.25, "spatial_pred": 0.25}
    assert decides == pytest.approx(dict.fromkeys(TERMS, 0.0) | equals)
    assert shares_of(values, [[4, 5]], WEIGHTS) == ({}, {}) == shares_of(values, [], WEIGHTS)
    # the weight of spatial counts for both lists: group 2 is now 2 and 0
    doubled = {**WEIGHTS, "spatial": 2.0, "temporal": 0.0}
    values["total"] = 2 * (values["spatial_think"] + values["spatial_pred"])
    shares, _ = shares_of(values, [[2, 3]], doubled)
    assert (shares["spatial_think"], shares["spatial_pred"], shares["temporal"]) == (0.5, 0.5, 0)


AWAY_VALUE = -1 / 3 - 0.8  # tests/test_rewards.py


def test_the_summary_of_a_group_by_hand(tmp_path, capsys):
    """Right (5), the right place over half of the time (4.5), the wrong person (3 - 34 / 15): vIoU 1, 1/2, 0;
    and alone in its group a text that is no answer."""
    records = [line(c, id="a") for c in (text(4, 7, RIGHT), text(4, 5, steps(4, 5, GOOD)), text(4, 7, WRONG))]
    _, summary = bench_of(tmp_path / "answers.jsonl", [*records, line("no", id="b")], capsys)
    table = read_table(summary)
    totals, temporal = [5, 4.5, 3 + 2 * AWAY_VALUE], [1, 0.5, 1]
    assert "4 answers, 3 of them parse; 1 groups" in summary
    assert table["total"]["mean"] == pytest.approx(sum(totals) / 4, abs=6e-4)
    assert (table["total"]["min"], table["total"]["max"]) == (0, 5)
    assert table["total"]["spread"] == pytest.approx(np.std(totals, ddof=1), abs=6e-4)
    assert table["temporal"]["spread"] == pytest.approx(np.std(temporal, ddof=1), abs=6e-4)
    assert table["format"]["spread"] == 0
    # ranks of the totals 4 3 2 1, of vIoU 4 3 1.5 1.5, less 2.5: products 2.25 + .25 + .5 + 1.5
    assert table["total"]["vIoU r"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5, abs=6e-4)
    covariance = np.cov([[1, 1, AWAY_VALUE], temporal, totals])[:, 2]  # numpy's, of one list of boxes
    for term, value in (("spatial_pred", covariance[0]), ("temporal", covariance[1])):
        assert table[term]["share"] == pytest.approx(value / covariance[2], abs=6e-4)
    assert table["temporal"]["share"] < 0
    assert sum(row["share"] or 0 for row in table.values()) == pytest.approx(1, abs=3e-3)
    assert (table["spatial_think"]["decides"], table["spatial_pred"]["decides"]) == (0.5, 0.5)
    assert (table["total"]["share"], table["total"]["decides"]) == (None, None)
    assert "falls where vIoU rises" not in summary
    assert LEGEND in " ".join(summary.split())


def test_the_correlation_is_with_the_final_boxes(tmp_path, capsys):
    """Of two answers one has good final boxes, the other good thinking boxes."""
    records = [line(text(4, 7, WRONG, RIGHT), id="a"), line(text(4, 7, RIGHT, WRONG), id="a")]
    _, summary = bench_of(tmp_path / "answers.jsonl", records, capsys)
    table = read_table(summary)
    assert (table["spatial_pred"]["vIoU r"], table["spatial_think"]["vIoU r"]) == (1, -1)
    page = tmp_path / "out.html"
    bench_of(tmp_path / "answers.jsonl", records, capsys, "--html", str(page))
    shown = re.findall(r"vIoU (\d\.\d\d)", page.read_text(encoding="utf-8"))
    assert shown == ["1.00", "0.00"]  # the better total, by the think reward, is the first


def test_a_reward_that_prefers_worse_answers_is_named(tmp_path, capsys):
    records = [line(text(4, 7, boxes)) for boxes in (RIGHT, WRONG)]
    config = tmp_path / "config.yaml"
    config.write_text("rewards: {spatial: -1}\n")
    _, summary = bench_of(tmp_path / "answers.jsonl", records, capsys, "--config", str(config))
    assert summary.splitlines()[-1].startswith("The total falls where vIoU rises (r = -1.00)")
    table = read_table(summary)
    assert table["spatial_pred"]["vIoU r"] == 1 and table["format"]["vIoU r"] is None
    assert {row["spread"] for row in table.values()} == {None}  # no groups


@given(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.data())
def test_spread_and_covariance_are_numpys(sizes, data):
    """Groups of any sizes whose lines stand anywhere: for each, numpy's own."""
    of_lines = st.lists(st.floats(-5, 5), min_size=sum(sizes), max_size=sum(sizes)).map(np.array)
    a, b, order = data.draw(of_lines), data.draw(of_lines), data.draw(st.permutations(range(sum(sizes))))
    groups = [list(part) for part in np.split(np.array(order), np.cumsum(sizes)[:-1])]
    spread = np.mean([np.std(a[group], ddof=1) for group in groups])
    assert bench.spread_within(a, groups) == pytest.approx(spread, abs=1e-9)
    products = bench.sums(bench.centred(a, groups) * bench.centred(b, groups), groups)
    expected = [np.cov(a[group], b[group])[0, 1] * (len(group) - 1) for group in groups]
    assert products == pytest.approx(expected, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------
# Other weights, and rewards of one's own


def test_lines_without_think_are_read_as_the_configuration_says(tmp_path, capsys):
    without = "<time> 4 - 4 </time> <pred_bbox> 4. [200, 200, 400, 600] </pred_bbox>"
    records = [line(without), line(text(4, 7, RIGHT)), line(text(4, 7, RIGHT), think=True)]
    config = tmp_path / "config.yaml"
    for think, expected in ((None, [0, 1, 1]), ("false", [1, 0, 1]), ("true", [0, 1, 1])):
        config.write_text(f"think: {think}\n" if think else "")
        words = ["--config", str(config)] if think else []
        output, _ = bench_of(tmp_path / "answers.jsonl", records, capsys, *words)
        assert [result["rewards"]["format"] for result in output] == expected
        assert all(("think" in r) == ("think" in result) for r, result in zip(records, output, strict=True))


def test_a_configuration_gives_the_weights(tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text("def length(answer, truth):\n    return answer.end - answer.start + 1\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"rewards: {{think: 0, '{plugin}:length': 0.25}}\n")
    records = [line(text(4, 7, WRONG, RIGHT), id="a"), line(text(4, 5, steps(4, 5, GOOD)), id="a")]
    words = ("--config", str(config), "rewards.temporal=2")
    output, summary = bench_of(tmp_path / "answers.jsonl", records, capsys, *words)
    name = f"{plugin}:length"
    assert [list(result["rewards"]) for result in output] == [[*TERMS, name, "total"]] * 2
    assert [result["rewards"][name] for result in output] == [4, 2]
    totals = [2 + 2 * 1 + AWAY_VALUE + 1 + 0.25 * 4, 2 + 2 * 0.5 + 2 + 0.25 * 2]
    assert [result["rewards"]["total"] for result in output] == pytest.approx(totals)
    # of two answers a share is a ratio of differences
    row = read_table(summary)[name]
    assert row["share"] == pytest.approx(0.25 * (4 - 2) / (totals[0] - totals[1]), abs=6e-4)
    assert sum(row["share"] or 0 for row in read_table(summary).values()) == pytest.approx(1, abs=4e-3)


def test_a_reward_that_is_not_there_ends_before_any_scoring(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", [{"neither": "completion nor truth"}])
    config = tmp_path / "config.yaml"
    config.write_text(f"rewards: {{'{tmp_path / 'absent.py'}:length': 1}}\n")
    for arguments in ([str(path)], ["--exploits"]):
        with pytest.raises(UserError, match=r"there is no file .*absent\.py; correct the path") as error:
            bench.main([*arguments, "--config", str(config)])
        assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_a_reward_beyond_all_numbers_names_the_line(tmp_path, capsys):
    """Two rewards are finite, and their difference is not."""
    plugin = tmp_path / "huge.py"
    plugin.write_text("def huge(answer, truth):\n    return 1e308 if answer.start == 4 else -1e308\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"rewards: {{'{plugin}:huge': 1}}\n")
    records = [line("no"), line(text(4, 7, RIGHT), id="a"), line(text(5, 5, {5: GOOD}), id="a")]
    path = write(tmp_path / "answers.jsonl", records)
    with pytest.raises(DataError, match=r"answers\.jsonl, line 2: the advantage is (nan|inf); write rewards"):
        bench.main([str(path), "--config", str(config)])
    assert capsys.readouterr().out == ""


def test_a_reward_that_fails_names_the_line(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("def inverse(answer, truth):\n    return 1 / (answer.end - 5)\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"rewards: {{'{plugin}:inverse': 1}}\n")
    path = write(
        tmp_path / "a.jsonl", [line(text(4, 7, RIGHT)), line("no"), line(text(4, 5, steps(4, 5, GOOD)))]
    )
    run = run_bench(path, "--config", config)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.startswith(f"error: {path}, line 3: {plugin}:inverse raised ZeroDivisionError")
    assert "(line 2); the answer was '<time> 4 - 5" in run.stderr


# ----------------------------------------------------------------------------------------------------------
# Faults


def faulty(**truth):
    return json.dumps({"completion": "", "truth": {"span": [4, 7], "boxes": {}} | truth})


NO_OBJECT = 'is no JSON object with "completion", "truth"; correct or remove it'
FAULTS = {
    "cut off": ('{"completion": "a", "tru', NO_OBJECT),
    "prose": ("hello", NO_OBJECT),
    "blank": ("", NO_OBJECT),
    "two objects": ("{} {}", NO_OBJECT),
    "not UTF-8": (b'{"completion": "\xff\xfe"}', NO_OBJECT),
    "too deep": ("[" * 100000, NO_OBJECT),
    "a list": ("[1, 2]", NO_OBJECT),
    "no completion": ('{"truth": {}}', NO_OBJECT),
    "no truth": ('{"completion": ""}', NO_OBJECT),
    "NaN": (faulty()[:-1] + ', "x": NaN}', "cannot be written as JSON"),
    "too large to write": (faulty()[:-1] + ', "x": 1e999}', "cannot be written as JSON"),
    "completion": (json.dumps(line(["a"])), '"completion" is'),
    "think": (json.dumps(line("", think="no")), "\"think\" is 'no': write true or false"),
    "scale": (json.dumps(line("", scale=[0, 1000])), '"scale"'),
    "truth": ('{"completion": "", "truth": [4, 7]}', '"truth": write'),
    "span backwards": (faulty(span=[7, 4]), r"truth span \[7, 4\]"),
    "span of floats": (faulty(span=[4.0, 7.0]), "truth span"),
    "span of one": (faulty(span=[4]), "truth span"),
    "boxes": (faulty(boxes=[[0, 0, 1, 1]]), "truth boxes"),
    "step": (faulty(boxes={"five": [0, 0, 1, 1]}), "truth box 'five'"),
    "pixels": (faulty(boxes={"5": [10, 20, 300, 400]}), "truth box '5'.*from 0 to 1"),
    "flipped": (faulty(boxes={"5": [0.5, 0, 0.1, 1]}), "truth box '5'.*x1 <= x2"),
    "three numbers": (faulty(boxes={"5": [0, 0, 1]}), "truth box '5'"),
    "a word": (faulty(boxes={"5": [0, 0, 1, "1"]}), "truth box '5'"),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS.keys())
def test_bench_names_file_and_line(fault, message, tmp_path, capsys):
    """Without a process of its own for every fault; the next test has one."""
    path = tmp_path / "answers.jsonl"
    good = json.dumps(line("")).encode()
    path.write_bytes(good + b"\n" + (fault if isinstance(fault, bytes) else fault.encode()) + b"\n" + good)
    with pytest.raises(DataError, match=rf"answers\.jsonl, line 2: .*{message}") as error:
        bench.main([str(path)])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""  # nothing half-written


def test_bench_fails_with_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line("")) + "\n{\n")
    page = tmp_path / "absent" / "page.html"
    good = write(tmp_path / "good.jsonl", [line("")])
    for run, message in (
        (run_bench(path), f"error: {path}, line 2: {NO_OBJECT}"),
        (
            run_bench("absent.jsonl"),
            "error: absent.jsonl: cannot be read (No such file or directory); check the path",
        ),
        (run_bench(good, "--html", page), f"error: {page}: No such file or directory; check the path"),
    ):
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith(message) and run.stderr.count("\n") == 1
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        bench.main([str(tmp_path)])


@pytest.mark.parametrize(
    "words, message",
    [
        (["rewards.think=1"], "--config rewards.think=1: name a YAML file first"),
        (["absent.yaml"], "absent.yaml: cannot be read"),
        (["configs/toy.yaml", "rewards.nothing=1"], "there is no weight 'nothing'"),
    ],
)
def test_a_configuration_that_cannot_be_used(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        bench.main(["--exploits", "--config", *words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a FILE.jsonl, perhaps with --html, or --exploits"),
        (["a.jsonl", "--exploits"], "name a FILE.jsonl, perhaps with --html, or --exploits"),
        (["--exploits", "--html", "a.html"], "name a FILE.jsonl, perhaps with --html, or --exploits"),
        (["a.jsonl", "b.jsonl"], "unrecognized arguments: b.jsonl"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("usage: python rewards.py") and message in printed.err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_bench_explains_itself(word):
    """How to write a reward first, then what a file of answers holds."""
    run = run_bench(word)
    assert (run.returncode, run.stderr) == (0, "")
    first, second = run.stdout.index(rewards.__doc__.strip()), run.stdout.index(bench.__doc__.strip())
    assert first < second
    assert all(option in run.stdout for option in ("FILE.jsonl", "--exploits", "--config", "--html"))


# ----------------------------------------------------------------------------------------------------------
# The page


def test_the_page_of_groups(tmp_path, capsys):
    """One group that the reward puts in the order of vIoU, and one that it turns round: evading pays 2."""
    evading = text(10, 12, steps(10, 12, AWAY))
    poor = text(4, 7, steps(4, 7, "0, 0, 1000, 1000"))  # vIoU 0.08, total 3 + 2 * (0.08 - 1.4)
    records = [line(text(4, 7, RIGHT), step=3, id="agrees"), line(text(4, 7, WRONG), step=3, id="agrees")]
    hostile = {"step": 3, "id": "<b>turned</b>", "sentence": "the man & his <script>dog</script>"}
    records += [line(poor, **hostile, generation=5), line(evading, **hostile, generation=6)]
    records += [line("<img src=x>", step=3, id="alone")]
    page = tmp_path / "out.html"
    output, summary = bench_of(tmp_path / "answers.jsonl", records, capsys, "--html", str(page))
    assert output == [] and "5 answers, 4 of them parse; 2 groups" in summary
    text_of = page.read_text(encoding="utf-8")
    assert text_of.index("&lt;b&gt;turned") < text_of.index("id agrees")  # the worst first
    assert "the man &amp; his &lt;script&gt;dog&lt;/script&gt;" in text_of
    assert "<b>turned" not in text_of and "<script>dog" not in text_of and "id alone" not in text_of
    better, worse = "answer 6: total 2.00, vIoU 0.00", "answer 5: total 0.36, vIoU 0.08"
    assert text_of.index(better) < text_of.index(worse)
    assert text_of.count('class="tubes"') == 4 and not re.search(r'(src|href)="(?!data:)', text_of)
    # truth 4 boxes in each of the four; think and pred 4 each, but for the tube that evades: 3 and 3
    boxes = {kind: len(re.findall(rf'class="box {kind}"', text_of)) for kind in ("truth", "think", "pred")}
    assert boxes == {"truth": 16, "think": 15, "pred": 15}
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text_of)
    for term, row in read_table(summary).items():
        start = cells.index(term)
        shown = [None if cell == "-" else float(cell) for cell in cells[start + 1 : start + len(HEADS)]]
        assert shown == list(row.values())


def test_the_page_of_predictions(tmp_path, capsys):
    """Without groups: the answers that the reward ranks furthest above their vIoU, 20 at most."""
    evading = text(10, 12, steps(10, 12, AWAY))
    poor = text(4, 7, steps(4, 7, "0, 0, 1000, 1000"))
    answers = [text(4, 7, RIGHT)] + [poor] * 25 + [evading]
    records = [line(answer, id=f"clip {k}") for k, answer in enumerate(answers)]
    page = tmp_path / "out.html"
    bench_of(tmp_path / "answers.jsonl", records, capsys, "--html", str(page))
    shown = re.findall(r"<h3>id clip (\d+)</h3>", page.read_text(encoding="utf-8"))
    assert shown[0] == "26" and len(shown) == 20
    bench_of(tmp_path / "answers.jsonl", [], capsys, "--html", str(page))
    assert "0 answers, 0 of them parse" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "span, answers, expected",
    [
        ((4, 7), [(5, 9)], [4, 5, 6, 7, 8, 9]),
        ((4, 7), [(0, 99999)], range(16)),  # near the truth only
        ((4, 7), [(7, 4), None], [4, 5, 6, 7]),
        ((100, 100), [(0, 2)], range(92, 101)),
    ],
)
def test_steps_that_are_drawn(span, answers, expected):
    truth = Truth(span, {})
    texts = ["no" if answer is None else text(*answer, {answer[0]: GOOD}) for answer in answers]
    assert bench.steps_to_draw(truth, [parse_answer(words) for words in texts]) == list(expected)


def test_of_a_long_event_sixteen_steps_are_drawn():
    assert bench.steps_to_draw(Truth((10, 310), {}), [None]) == list(range(10, 311, 20))


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width, tmp_path, capsys):
    """Groups, an answer that does not parse, one of many steps, and a term with a long name."""
    plugin = tmp_path / "rewards_with_a_long_name.py"
    plugin.write_text("def length(answer, truth):\n    return answer.end - answer.start + 1\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"rewards: {{'{plugin}:length': 0.1}}\n")
    long = steps(0, 40, AWAY)
    records = [line(c, id="a" * 200) for c in (text(4, 7, RIGHT), text(0, 40, long), "no " * 500)]
    records += [line(text(4, 7, boxes), id="<script>x()</script>", step=2) for boxes in (RIGHT, WRONG)]
    page = tmp_path / "out.html"
    bench_of(tmp_path / "answers.jsonl", records, capsys, "--html", str(page), "--config", str(config))
    with open_browser() as driver:
        assert look(driver, page, width) == []
        shown = driver.execute_script(
            "return ['svg.tubes', 'h3', 'table'].map(kind => document.querySelectorAll(kind).length)"
        )
    assert shown == [5, 2, 3]
