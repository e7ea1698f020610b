"""The bench: groups, spread, shares and correlations by hand and by numpy; faulty lines are named."""

import json
import re
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from config import Config
from lab import bench
from lab.bench import HEADS, ranks, spearman, term_weights, within_groups
from prompts import Answer, format_answer
from rewards import TERMS, WEIGHTS
from runtime.files import DataError

GOOD, AWAY = (200, 200, 400, 600), (600, 200, 800, 600)  # the truth, and the wrong person
AWAY_VALUE = -1 / 3 - 0.8  # of that: GIoU - L1
TRUTH = {"span": [4, 7], "boxes": {str(step): [0.2, 0.2, 0.4, 0.6] for step in range(4, 8)}}
few = settings(max_examples=50, deadline=None)


def text(start, end, think, pred):
    """An answer with one box in every step, in the thinking and in the final boxes."""
    lists = (tuple((step, box) for step in range(start, end + 1)) for box in (think, pred))
    return format_answer(Answer(start, end, *lists))


RIGHT, WRONG, HALF = text(4, 7, GOOD, GOOD), text(4, 7, AWAY, AWAY), text(4, 5, GOOD, GOOD)


def line(completion, **more):
    return {"completion": completion, "truth": TRUTH} | more


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def table_of(tmp_path, capsys):
    """table_of(records, words of --config) -> what is printed, and term -> head -> number, or None for -."""

    def run(records, *words):
        path = str(write(tmp_path / "answers.jsonl", records))
        bench.main([path, "--config", *words] if words else [path])
        printed, rows = capsys.readouterr().out, {}
        for cells in (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()):
            if len(cells) == len(HEADS) + 1:
                numbers = [None if cell == "-" else float(cell) for cell in cells[1:]]
                rows[cells[0]] = dict(zip(HEADS, numbers, strict=True))
        return printed, rows

    return run


def test_ranks_and_their_correlation_by_hand():
    assert ranks(np.array([30.0, 10.0, 20.0, 10.0])).tolist() == [4, 1.5, 3, 1.5]
    assert ranks(np.array([0.3, 0.1 + 0.2, 0.0])).tolist() == [2.5, 2.5, 1]  # equal but for rounding
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert spearman(np.array([1, 2, 3, 4]), np.array([0.1, 0.3, 0.2, 0.9])) == pytest.approx(0.8)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4, less 2.5: products 2.25 + 2.25, squares 4.5 and 5
    assert spearman(np.array([0, 1, 1, 7]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


@few
@given(st.permutations(range(8)), st.permutations(range(8)))
def test_the_correlation_by_the_formula_of_squared_differences(a, b):
    """Without ties: 1 - 6 sum(d^2) / (n (n^2 - 1))."""
    expected = 1 - Fraction(6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)), 8 * 63)
    p, q = np.array(a) ** 3 / 7, np.exp(np.array(b))  # ranks do not mind what is monotonic
    assert spearman(p, q) == pytest.approx(float(expected), abs=1e-12)


@few
@given(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.data())
def test_spread_and_shares_are_numpys(sizes, data):
    """Groups of any sizes, their lines anywhere. The total is linear in the terms: shares add up to 1."""
    count = sum(sizes)
    terms = [data.draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count)) for _ in range(3)]
    order = np.array(data.draw(st.permutations(range(count))))
    groups = [list(part) for part in np.split(order, np.cumsum(sizes)[:-1])]
    weights = np.array([1.0, 2.0, -0.5])
    values = np.array([*terms, weights @ np.array(terms)]).T
    assume(any(np.var(values[group, -1]) > 1e-6 for group in groups))
    spread, share, decides = within_groups(values, groups, weights)
    assert spread == pytest.approx(np.mean([values[g].std(axis=0, ddof=1) for g in groups], axis=0), abs=1e-9)
    covariances = sum((len(g) - 1) * np.cov(values[g].T)[-1] for g in groups)
    assert share == pytest.approx(weights * covariances[:-1] / covariances[-1], rel=1e-6, abs=1e-9)
    assert share.sum() == pytest.approx(1, abs=1e-6) and decides.sum() == pytest.approx(1)


def test_shares_by_hand():
    """Two groups of two, whose spreads are differences, and one without any.

    Group 1: temporal 1 and 0, thinking boxes 0 and 0.5: total 1 and 0.5. Of 0.5 * 0.5 temporal has 1 * 0.5,
    the thinking boxes -0.5 * 0.5. Group 2: both lists 0.5 and 0, total 1 and 0: of 1 * 1 each has 0.5 * 1.
    """
    terms = np.array([[1, 0, 0, 0, 2, 2.0], [0, 0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0, 0, 0]])
    values = np.vstack([terms, terms.sum(axis=0)]).T
    _, share, decides = within_groups(values, [[0, 1], [2, 3], [4, 5]], np.ones(3))
    assert share == pytest.approx(np.array([0.5, 0.25, 0.5]) / 1.25)
    # temporal decides the first group; the second is shared by two equals; the third has no order
    assert decides == pytest.approx([0.5, 0.25, 0.25])
    for groups in ([[4, 5]], []):
        spread, share, decides = within_groups(values, groups, np.ones(3))
        assert np.isnan([*share, *decides]).all() and np.isnan(spread).all() == (groups == [])


def test_the_table_of_a_group_by_hand(table_of):
    """Right (5), the right place over half of the time (4.5), the wrong person (3 - 34 / 15): vIoU 1, 1/2, 0;
    and alone in its group a text that is no answer."""
    printed, table = table_of([*(line(c, id="a") for c in (RIGHT, HALF, WRONG)), line("no", id="b")])
    totals, temporal = [5, 4.5, 3 + 2 * AWAY_VALUE], [1, 0.5, 1]
    assert printed.startswith("4 answers, 3 of them parse; 1 groups\n")
    assert list(table) == [*TERMS, "total"]
    assert table["total"]["mean"] == pytest.approx(sum(totals) / 4, abs=6e-4)
    assert (table["total"]["min"], table["total"]["max"]) == (0, 5)
    for term, values in (("total", totals), ("temporal", temporal), ("format", [1, 1, 1])):
        assert table[term]["spread"] == pytest.approx(np.std(values, ddof=1), abs=6e-4)
    # ranks of the totals 4 3 2 1, of vIoU 4 3 1.5 1.5, less 2.5: products 2.25 + .25 + .5 + 1.5
    assert table["total"]["vIoU r"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5, abs=6e-4)
    covariance = np.cov([[1, 1, AWAY_VALUE], temporal, totals])[:, 2]  # numpy's, of one list of boxes
    for term, value in (("spatial_pred", covariance[0]), ("temporal", covariance[1])):
        assert table[term]["share"] == pytest.approx(value / covariance[2], abs=6e-4)
    assert (table["spatial_think"]["decides"], table["spatial_pred"]["decides"]) == (0.5, 0.5)
    assert (table["total"]["share"], table["total"]["decides"]) == (None, None)
    assert "falls where vIoU rises" not in printed


def test_the_correlation_is_with_the_final_boxes(table_of):
    """Of two answers one has good final boxes, the other good thinking boxes. Alone they are no group."""
    printed, table = table_of([line(text(4, 7, AWAY, GOOD)), line(text(4, 7, GOOD, AWAY))])
    assert (table["spatial_pred"]["vIoU r"], table["spatial_think"]["vIoU r"]) == (1, -1)
    assert "; 0 groups" in printed and {row["spread"] for row in table.values()} == {None}


@pytest.mark.parametrize(
    "keys, groups",
    [
        ([{"id": 1}, {"id": "1"}, {"id": 1}, {}, {}], [[0, 2]]),  # 1 is not "1"
        ([{"id": "a", "step": step} for step in (1, 2, 1, 3)], [[0, 2]]),
        # of one step: the same sentence twice, where an epoch ends within the batch
        ([{"id": "a", "step": 1, "generation": g} for g in (0, 1, 2, 0, 1, 2)], [[0, 1, 2], [3, 4, 5]]),
        ([{"id": i, "step": 1, "generation": g} for i in "ab" for g in (0, 1)], [[0, 1], [2, 3]]),
        # the records say which group: those of two ranks may be mixed, and in any order
        ([{"id": "a", "group": k, "generation": g} for g in (1, 0) for k in (0, 1)], [[0, 2], [1, 3]]),
        ([{"id": "a", "group": 5, "step": s} for s in (1, 2, 1, 2)], [[0, 2], [1, 3]]),
        ([{"group": k} for k in (0, 1, 0, None, 1)], [[0, 2], [1, 4]]),
    ],
)
def test_groups(tmp_path, keys, groups):
    path = write(tmp_path / "answers.jsonl", [line("no", **key) for key in keys])
    assert bench.score_file(path, Config()).groups == groups


@pytest.mark.parametrize("mixed", [False, True])
def test_a_sentence_twice_in_a_batch_is_two_groups(tmp_path, mixed):
    """Spread by hand, and the advantages in the file are those within the bench's groups (Eq. 11)."""
    totals, records = {RIGHT: 5, HALF: 4.5, WRONG: 3 + 2 * AWAY_VALUE}, []
    for k, answers in enumerate([(RIGHT, HALF), (HALF, WRONG)]):
        rewards = np.array([totals[answer] for answer in answers])
        for g, a in enumerate((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)):
            records.append(line(answers[g], step=3, group=k, id="a", generation=g, advantage=a))
    records.sort(key=lambda record: record["generation"] if mixed else 0)
    scored = bench.score_file(write(tmp_path / "rollouts.jsonl", records), Config())
    assert len(scored.groups) == 2
    for group in scored.groups:
        rewards = scored.values[group, -1]
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert [records[n]["advantage"] for n in group] == pytest.approx(expected.tolist(), abs=1e-9)
    spread = bench.term_table(scored, WEIGHTS)["total"][HEADS.index("spread")]
    assert spread == pytest.approx((0.5 + totals[HALF] - totals[WRONG]) / 2 / 2**0.5)


def test_what_is_kept_of_an_answer_is_its_numbers(tmp_path):
    path = write(tmp_path / "answers.jsonl", (line("no" * 50000, id="a") for _ in range(100)))
    tracemalloc.start()
    bench.score_file(path, Config())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 1e7 > 4 * peak


def test_a_run_has_its_rewards_and_a_last_line_that_is_cut_off(tmp_path, capsys):
    write(tmp_path / "rollouts.jsonl", [line(RIGHT)]).open("a").write('{"completion')
    (tmp_path / "config.yaml").write_text("rewards: {temporal: 3}\n")
    bench.main([str(tmp_path)])
    assert re.search(r"^total +7\.000 ", capsys.readouterr().out, re.M)
    bench.main([str(tmp_path), "--config", "rewards.temporal=0"])
    assert re.search(r"^total +4\.000 ", capsys.readouterr().out, re.M)


def test_a_configuration_gives_the_weights_and_whether_answers_think(tmp_path, table_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("length = lambda answer, truth: answer.end - answer.start + 1\n")
    name, records = f"{tmp_path}/mine.py:length", [line(text(4, 7, AWAY, GOOD), id="a"), line(HALF, id="a")]
    assert term_weights(WEIGHTS | {"spatial": 3, name: 2})["spatial_think"] == 3
    _, table = table_of(records, f"rewards.{name}=0.25", "rewards.think=0", "rewards.temporal=2")
    totals = [2 + 2 * 1 + AWAY_VALUE + 1 + 0.25 * 4, 2 + 2 * 0.5 + 2 + 0.25 * 2]
    assert list(table) == [*TERMS, name, "total"]
    assert table["total"]["mean"] == pytest.approx(np.mean(totals), abs=6e-4)
    # of two answers a share is a ratio of differences
    assert table[name]["share"] == pytest.approx(0.25 * (4 - 2) / (totals[0] - totals[1]), abs=6e-4)
    without = "<time> 4 - 4 </time> <pred_bbox> 4. [200, 200, 400, 600] </pred_bbox>"
    _, table = table_of([line(without), line(RIGHT), line(RIGHT, think=True)], "think=false")
    assert table["format"]["mean"] == pytest.approx(2 / 3, abs=6e-4)


def test_a_reward_that_prefers_worse_answers_is_named(table_of):
    printed, table = table_of([line(RIGHT), line(WRONG)], "rewards.spatial=-1")
    assert "falls where vIoU rises (r = -1.00)" in printed
    assert table["spatial_pred"]["vIoU r"] == 1 and table["format"]["vIoU r"] is None


def test_no_answers_and_no_minus_zero(table_of):
    assert table_of([]) == ("0 answers, 0 of them parse; 0 groups\n", {})
    rounding = bench.Scored(np.full((1, 7), -2e-16), np.zeros(1), 1, [])
    assert not re.search(r"-0\.0|e-", bench.summary(rounding, WEIGHTS))


FAULTS = {
    "completion": line(["a"]),
    "think": line("", think="no"),
    "scale": line("", scale=[0, 1000]),
    "truth": line("", truth=[4, 7]),
    "backwards": line("", truth={"span": [7, 4], "boxes": {}}),
    "step": line("", truth={"span": [4, 7], "boxes": {"five": [0, 0, 1, 1]}}),
    "pixels": line("", truth={"span": [4, 7], "boxes": {"5": [10, 20, 300, 400]}}),
    "flipped": line("", truth={"span": [4, 7], "boxes": {"5": [0.5, 0, 0.1, 1]}}),
    "NaN": line("", truth={"span": [4, 7], "boxes": {"5": [0, 0, 1, float("nan")]}}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_faulty_line_is_named(fault, tmp_path):
    path = write(tmp_path / "answers.jsonl", [line(""), fault, line("")])
    with pytest.raises(DataError, match=r"answers\.jsonl, (line|record) 2: .*(write|correct)"):
        bench.main([str(path)])
