"""The five rewards: hand-worked numbers, a second implementation in fractions, fuzzing, plug-ins."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompts import Answer, format_answer, truth_answer
from rewards import TERMS, giou, iou, l1, main, score
from samples import Truth

PAIRS = {  # a, b, IoU, GIoU, L1 by hand
    "same": ((0.2, 0.2, 0.4, 0.6), (0.2, 0.2, 0.4, 0.6), 1, 1, 0),
    "half": ((0, 0, 0.5, 1), (0, 0, 1, 1), 1 / 2, 1 / 2, 1 / 2),
    # areas .25 and .25, shared .0625, union .4375, hull .5625
    "corner": ((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 1 / 7, 1 / 7 - 2 / 9, 1),
    "touching": ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0, 0, 1),
    # areas .08 and .08, hull .6 * .4 = .24
    "apart": ((0.2, 0.2, 0.4, 0.6), (0.6, 0.2, 0.8, 0.6), 0, -1 / 3, 0.8),
    # negative extents in both directions make no area: union .02, hull 1
    "far corners": ((0, 0, 0.1, 0.1), (0.9, 0.9, 1, 1), 0, -0.98, 3.6),
    "inside": ((0.25, 0.25, 0.75, 0.75), (0, 0, 1, 1), 1 / 4, 1 / 4, 1),
    "flipped x": ((0.4, 0.2, 0.2, 0.6), (0.2, 0.2, 0.4, 0.6), 0, -1, 0.4),
    "flipped twice": ((0.4, 0.6, 0.2, 0.2), (0.2, 0.2, 0.4, 0.6), 0, -1, 1.2),
    "inside out": ((1, 1, 0, 0), (0, 0, 1, 1), 0, -1, 4),
    "no width": ((0.2, 0.2, 0.2, 0.6), (0.2, 0.2, 0.4, 0.6), 0, -1, 0.2),
    "a point": ((0, 0, 0, 0), (0.2, 0.2, 0.4, 0.6), 0, -1, 1.4),
}


@pytest.mark.parametrize("a, b, iou_, giou_, l1_", PAIRS.values(), ids=PAIRS.keys())
def test_two_boxes_by_hand(a, b, iou_, giou_, l1_):
    for p, q in ((a, b), (b, a)):
        assert (iou(p, q), giou(p, q), l1(p, q)) == pytest.approx((iou_, giou_, l1_), abs=1e-12)


corner = st.tuples(*[st.integers(0, 6)] * 4)


@given(corner, corner)
def test_iou_and_giou_by_counting_cells(a, b):
    """On a 6 x 6 board a box is a set of cells."""
    sets = [{(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in (a, b)]
    p, q = (tuple(v / 6 for v in box) for box in (a, b))
    if not (sets[0] and sets[1]):
        assert (iou(p, q), giou(p, q)) == (0, -1)
        return
    union = sets[0] | sets[1]
    columns, rows = {x for x, _ in union}, {y for _, y in union}
    hull = (max(columns) - min(columns) + 1) * (max(rows) - min(rows) + 1)
    share = len(sets[0] & sets[1]) / len(union)
    assert iou(p, q) == pytest.approx(share, abs=1e-12)
    assert giou(p, q) == pytest.approx(share - (hull - len(union)) / hull, abs=1e-12)


unit_box = st.tuples(*[st.floats(0, 1)] * 4)


@given(st.tuples(*[st.integers(0, 99999)] * 4), unit_box)
def test_a_box_is_bounded(text_box, truth_box):
    box = tuple(min(v / 1000, 1.0) for v in text_box)
    assert -1 <= giou(box, truth_box) <= 1 and 0 <= l1(box, truth_box) <= 4 and 0 <= iou(box, truth_box) <= 1
    assert giou(box, truth_box) - l1(box, truth_box) <= 1


# The truth is one box in steps 4 to 7. What a box in the text earns (GIoU - L1), by hand:

GOOD = "200, 200, 400, 600"  # the truth: 1
AWAY = "600, 200, 800, 600"  # the wrong person: -1/3 - 0.8
FLIPPED = "400, 200, 200, 600"  # -1 - 0.4
TWICE = "400, 600, 200, 200"  # -1 - 1.2
LINE = "200, 200, 200, 600"  # no width: -1 - 0.2
HUGE = "99999, 99999, 99999, 99999"  # clamped to (1, 1, 1, 1): -1 - 2.6
WIDE = "0, 0, 1001, 99999"  # clamped to the frame: 0.08 - 1.4
NONE = -1 - 1.4  # a box that is missing: (0, 0, 0, 0)
away = -1 / 3 - 0.8

TRUTH = Truth((4, 7), dict.fromkeys(range(4, 8), (0.2, 0.2, 0.4, 0.6)))


def text(start, end, *lists):
    """Each list is a dict or a list of pairs step -> box; one list stands for both."""
    think, pred = lists if len(lists) == 2 else lists * 2
    parts = [f"<time> {start} - {end} </time>"]
    for tag, items in (("think_bbox", think), ("pred_bbox", pred)):
        pairs = items.items() if isinstance(items, dict) else items
        listed = ", ".join(f"{i}. [{box}]" for i, box in pairs)
        parts.append(f"<{tag}> {listed} </{tag}>")
    return " ".join(parts)


def steps(first, last, box):
    return dict.fromkeys(range(first, last + 1), box)


def good(*at):
    return [(i, GOOD) for i in at]


RIGHT = steps(4, 7, GOOD)
lost, alone = (3 + NONE) / 4, (1 + 3 * NONE) / 4  # one of four boxes is missing; three are
TABLE = {  # text: format, consistency, temporal, spatial_think, spatial_pred, think; total
    "oracle": (text(4, 7, RIGHT), (1, 1, 1, 1, 1, 0), 5),
    "all bad": (text(4, 7, steps(4, 7, AWAY)), (1, 1, 1, away, away, 0), 3 + 2 * away),
    "flipped": (text(4, 7, steps(4, 7, FLIPPED)), (1, 1, 1, -1.4, -1.4, 0), 0.2),
    "doubly flipped": (text(4, 7, steps(4, 7, TWICE)), (1, 1, 1, -2.2, -2.2, 0), -1.4),
    "no width": (text(4, 7, steps(4, 7, LINE)), (1, 1, 1, -1.2, -1.2, 0), 0.6),
    "refined": (text(4, 7, steps(4, 7, AWAY), RIGHT), (1, 1, 1, away, 1, 1 - away), 4.5 + away / 2),
    "spoilt": (text(4, 7, RIGHT, steps(4, 7, AWAY)), (1, 1, 1, 1, away, 0), 4 + away),
    "one frame": (text(5, 5, {5: GOOD}), (1, 1, 1 / 4, 1, 1, 0), 4.25),
    "half": (text(6, 9, steps(6, 9, GOOD)), (1, 1, 2 / 6, 1, 1, 0), 4 + 1 / 3),
    "judged inside": (text(6, 9, [*good(6, 7), (8, AWAY), (9, TWICE)]), (1, 1, 1 / 3, 1, 1, 0), 4 + 1 / 3),
    "around": (text(2, 9, steps(2, 9, GOOD)), (1, 1, 4 / 8, 1, 1, 0), 4.5),
    "no overlap": (text(10, 12, steps(10, 12, AWAY)), (1, 1, 0, 0, 0, 0), 2),
    "next door": (text(8, 8, {8: GOOD}), (1, 1, 0, 0, 0, 0), 2),
    "missing": (text(4, 7, RIGHT, good(4, 5, 7)), (1, 0, 1, 1, lost, 0), 3 + lost),
    "missing, both": (text(4, 7, good(4)), (1, 0, 1, alone, alone, 0), 2 + 2 * alone),
    "boxes of other steps": (text(4, 7, {0: GOOD}), (1, 0, 1, NONE, NONE, 0), 2 + 2 * NONE),
    "repeated": (text(4, 7, RIGHT, [*good(4, 5), (5, AWAY), *good(6, 7)]), (1, 0, 1, 1, 1, 0), 4),
    "repeated, first bad": (
        text(4, 7, RIGHT, [*good(4), (5, AWAY), *good(5, 6, 7)]),
        (1, 0, 1, 1, (3 + away) / 4, 0),
        3 + (3 + away) / 4,
    ),
    "repeated in place of one": (text(4, 7, RIGHT, good(4, 5, 5, 7)), (1, 0, 1, 1, lost, 0), 3 + lost),
    "out of order": (text(4, 7, good(4, 6, 5, 7)), (1, 0, 1, 1, 1, 0), 4),
    "one too many": (text(4, 7, steps(4, 8, GOOD)), (1, 0, 1, 1, 1, 0), 4),
    "think is incomplete": (text(4, 7, good(4), RIGHT), (1, 0, 1, alone, 1, 1 - alone), 3.5 + alone / 2),
    "huge box": (text(4, 7, steps(4, 7, HUGE)), (1, 1, 1, -3.6, -3.6, 0), -4.2),
    "clamped": (text(4, 7, steps(4, 7, WIDE)), (1, 1, 1, -1.32, -1.32, 0), 0.36),
    "huge span": (text(0, 99999, RIGHT), (1, 0, 4e-5, 1, 1, 0), 3 + 4e-5),
    "end before start": (text(7, 4, RIGHT), (1, 0, 0, 0, 0, 0), 1),
    "end just before start": (text(5, 4, {5: GOOD}), (1, 0, 0, 0, 0, 0), 1),
    "malformed": (text(4, 7, RIGHT) + " done", (0, 0, 0, 0, 0, 0), 0),
    "empty": ("", (0, 0, 0, 0, 0, 0), 0),
    "six digits": (text(4, 100000, RIGHT), (0, 0, 0, 0, 0, 0), 0),
    "no think": ("<time>4-7</time><pred_bbox>4.[1,2,3,4]</pred_bbox>", (0, 0, 0, 0, 0, 0), 0),
}


@pytest.mark.parametrize("completion, terms, total", TABLE.values(), ids=TABLE.keys())
def test_table(completion, terms, total):
    result = score(completion, TRUTH)
    assert list(result.rewards) == [*TERMS, "total"]
    assert all(type(value) is float for value in result.rewards.values())
    assert tuple(result.rewards.values()) == pytest.approx((*terms, total), abs=1e-12)
    assert (result.answer is None) == (terms[0] == 0)


def test_without_thinking_boxes():
    completion = format_answer(truth_answer(TRUTH, (1000, 1000), think=False))
    assert list(score(completion, TRUTH, think=False).rewards.values()) == [1, 1, 1, 0, 1, 0, 4]
    assert score(completion, TRUTH).rewards["total"] == 0
    assert score(text(4, 7, RIGHT), TRUTH, think=False).rewards["total"] == 0
    bad = completion.replace("200, 200, 400, 600", AWAY)
    assert score(bad, TRUTH, think=False).rewards["total"] == pytest.approx(3 + away)


def test_steps_without_a_truth_box_are_not_judged():
    gap = Truth((4, 7), {i: TRUTH.boxes[i] for i in (4, 6, 7)})
    assert score(text(4, 7, RIGHT | {5: TWICE}), gap).rewards["total"] == 5
    assert list(score(text(5, 5, {5: GOOD}), gap).rewards.values()) == [1, 1, 0.25, 0, 0, 0, 2.25]
    assert score(text(4, 7, RIGHT), Truth((4, 7), {})).rewards["total"] == 3
    outside = Truth((4, 7), TRUTH.boxes | {9: (0.0, 0.0, 1.0, 1.0)})  # a stray box beyond the span
    assert score(text(4, 9, steps(4, 9, GOOD)), outside).rewards["spatial_pred"] == 1


def test_the_scale_is_divided_out():
    truth = Truth((0, 0), {0: (0.25, 0.25, 0.5, 0.5)})
    completion = text(0, 0, {0: "84, 47, 168, 94"})
    assert score(completion, truth, scale=(336, 188)).rewards["total"] == 5
    assert score(completion, truth).rewards["total"] < 3


def test_worst_and_best():
    truth = Truth((0, 0), {0: (0.0, 0.0, 1.0, 1.0)})
    inside_out, whole = "1000, 1000, 0, 0", "0, 0, 1000, 1000"
    assert score(text(0, 0, {0: inside_out}), truth).rewards["spatial_pred"] == -5
    far = score(text(0, 99999, {0: inside_out}), truth).rewards["total"]
    assert -9 < far == pytest.approx(-9 + 1e-5)
    assert score(text(0, 0, {0: inside_out}, {0: whole}), truth).rewards["think"] == 6
    assert score(text(0, 0, {0: whole}), truth).rewards["total"] == 5


@st.composite
def grid_truths(draw):
    """A scale and a truth of proper boxes on its integer grid; some steps may have no box."""
    scale = draw(
        st.sampled_from([(1000, 1000), (336, 188), (1920, 1080), (7, 5)])
        | st.tuples(*[st.integers(2, 9999)] * 2)
    )
    first = draw(st.integers(0, 500))
    last = first + draw(st.integers(0, 30))
    boxes = {}
    for step in range(first, last + 1):
        if step == first or draw(st.integers(0, 3)):
            x1, y1 = draw(st.integers(0, scale[0] - 1)), draw(st.integers(0, scale[1] - 1))
            x2, y2 = draw(st.integers(x1 + 1, scale[0])), draw(st.integers(y1 + 1, scale[1]))
            boxes[step] = (x1 / scale[0], y1 / scale[1], x2 / scale[0], y2 / scale[1])
    return scale, Truth((first, last), boxes)


@given(grid_truths())
def test_the_truth_scores_exactly_five(scale_and_truth):
    scale, truth = scale_and_truth
    result = score(format_answer(truth_answer(truth, scale)), truth, scale)
    assert result.rewards["total"] == 5.0
    without = score(format_answer(truth_answer(truth, scale, think=False)), truth, scale, think=False)
    assert without.rewards["total"] == 4.0


def slow_score(answer, truth, scale):
    """The paper's formulas with sets and exact fractions, for spans small enough to be listed."""
    said, true = (set(range(s, e + 1)) for s, e in ((answer.start, answer.end), truth.span))
    either = range(min(said | true), max(said | true) + 1)
    lists = {"spatial_think": answer.think, "spatial_pred": answer.pred}
    listed = [[i for i, _ in items] for items in lists.values()]
    terms = {"format": 1, "temporal": Fraction(len(said & true), len(either))}
    terms["consistency"] = int(bool(said) and listed == [sorted(said)] * 2)
    for name, items in lists.items():
        values = []
        for step in said & true & truth.boxes.keys():
            box = next((box for i, box in items if i == step), (0, 0, 0, 0))
            p = [min(Fraction(v, scale[k % 2]), Fraction(1)) for k, v in enumerate(box)]
            g = [Fraction(v) for v in truth.boxes[step]]
            value = Fraction(-1)
            if p[0] < p[2] and p[1] < p[3]:
                sides = [(min(p[k + 2], g[k + 2]) - max(p[k], g[k])) for k in (0, 1)]
                shared = sides[0] * sides[1] if min(sides) > 0 else 0
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (p, g)]
                union = sum(areas) - shared
                hull = (max(p[2], g[2]) - min(p[0], g[0])) * (max(p[3], g[3]) - min(p[1], g[1]))
                value = shared / union - (hull - union) / hull
            values.append(value - sum(abs(a - b) for a, b in zip(p, g, strict=True)))
        terms[name] = sum(values) / len(values) if values else 0
    terms["think"] = max(terms["spatial_pred"] - terms["spatial_think"], 0)
    return {name: float(terms[name]) for name in TERMS}


near = st.integers(0, 12)
text_boxes = st.tuples(*[st.integers(0, 12)] * 4)
items = st.lists(st.tuples(near, text_boxes), min_size=1, max_size=8).map(tuple)
same_box = st.tuples(near, st.integers(0, 5), text_boxes)  # in each step
listed = same_box.map(lambda x: (x[0], x[0] + x[1], tuple((x[0] + k, x[2]) for k in range(x[1] + 1))))
small_answers = st.builds(Answer, near, near, items, items) | listed.map(lambda x: Answer(*x, x[2]))


@st.composite
def small_truths(draw):
    first = draw(near)
    last = first + draw(st.integers(0, 5))
    boxes = {}
    for step in range(first, last + 1):
        x1, y1 = draw(st.integers(0, 7)), draw(st.integers(0, 7))
        if draw(st.booleans()):
            boxes[step] = (x1 / 8, y1 / 8, draw(st.integers(x1 + 1, 8)) / 8, draw(st.integers(y1 + 1, 8)) / 8)
    return Truth((first, last), boxes)


@given(small_answers, small_truths())
def test_against_the_slow_implementation(answer, truth):
    result = score(format_answer(answer), truth, scale=(10, 11))
    expected = slow_score(answer, truth, (10, 11))
    assert {name: result.rewards[name] for name in TERMS} == pytest.approx(expected, abs=1e-12)
    total = sum(expected.values()) - expected["think"] / 2  # the weights of the paper
    assert result.rewards["total"] == pytest.approx(total, abs=1e-12)


wide = st.integers(0, 99999)
any_items = st.lists(
    st.tuples(st.integers(0, 12) | wide, st.tuples(*[wide | st.integers(0, 1000)] * 4)), min_size=1
)
any_answers = st.builds(Answer, near | wide, near | wide, any_items.map(tuple), any_items.map(tuple))
proper_box = unit_box.map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
spans = st.tuples(near, wide).map(lambda x: (x[0], x[0] + x[1]))
any_truths = st.builds(Truth, spans, st.dictionaries(near, proper_box))


@given(st.text() | any_answers.map(format_answer), any_truths, st.booleans())
def test_every_score_is_finite_and_bounded(completion, truth, think):
    result = score(completion, truth, think=think)
    values = [*result.rewards.values(), *result.diagnostics.values()]
    assert all(type(value) is float and math.isfinite(value) for value in values)
    terms = result.rewards
    assert {terms["format"], terms["consistency"]} <= {0, 1} and 0 <= terms["temporal"] <= 1
    assert -5 <= terms["spatial_think"] <= 1 and -5 <= terms["spatial_pred"] <= 1 and 0 <= terms["think"] <= 6
    assert -9 < terms["total"] <= 5
    diagnostics = {**result.diagnostics}
    assert diagnostics.pop("span_ratio") >= 0 and abs(diagnostics.pop("think_gap")) <= 6
    assert all(0 <= value <= 1 for value in diagnostics.values())
    if not think:
        assert terms["spatial_think"] == terms["think"] == 0 and -4 < terms["total"] <= 4


def test_a_long_answer_is_no_trouble():
    """A list of 50,000 boxes beside the widest span and the widest truth."""
    truth = Truth((0, 99999), dict.fromkeys(range(100000), (0.2, 0.2, 0.4, 0.6)))
    result = score(text(0, 99999, steps(0, 99999, GOOD), steps(0, 49999, GOOD)), truth)
    expected = [1, 0, 1, 1, (1 + NONE) / 2, 0]
    assert list(result.rewards.values())[:6] == pytest.approx(expected)


DIAGNOSTICS = {  # text: overlap, span_ratio, one_step, invalid_boxes, out_of_frame, copied; gap; tiou, vious
    "oracle": (text(4, 7, RIGHT), (1, 1, 0, 0, 0, 1, 0, 1, 1, 1)),
    "refined": (text(4, 7, steps(4, 7, AWAY), RIGHT), (1, 1, 0, 0, 0, 0, 1 - away, 1, 0, 1)),
    "spoilt": (text(4, 7, RIGHT, steps(4, 7, AWAY)), (1, 1, 0, 0, 0, 0, away - 1, 1, 1, 0)),
    "half": (text(6, 9, steps(6, 9, GOOD)), (1, 1, 0, 0, 0, 1, 0, 1 / 3, 1 / 3, 1 / 3)),
    "one frame": (text(5, 5, {5: GOOD}), (1, 1 / 4, 1, 0, 0, 1, 0, 1 / 4, 1 / 4, 1 / 4)),
    "no overlap": (text(10, 17, steps(10, 17, AWAY)), (0, 2, 0, 0, 0, 1, 0, 0, 0, 0)),
    "missing": (text(4, 7, RIGHT, good(4, 5, 7)), (1, 1, 0, 0, 0, 0, lost - 1, 1, 1, 3 / 4)),
    "invalid": (
        text(4, 7, RIGHT, RIGHT | {5: HUGE, 6: LINE}),
        (1, 1, 0, 2 / 8, 1 / 8, 0, (2 - 3.6 - 1.2) / 4 - 1, 1, 1, 1 / 2),
    ),
    "wide": (text(4, 7, steps(4, 7, WIDE), RIGHT), (1, 1, 0, 0, 4 / 8, 0, 2.32, 1, 0.08, 1)),
    "cut to the same": (
        text(4, 7, steps(4, 7, WIDE), steps(4, 7, "0, 0, 1000, 1000")),
        (1, 1, 0, 0, 4 / 8, 1, 0, 1, 0.08, 0.08),
    ),
    "end before start": (text(7, 4, {4: TWICE}), (0, 0, 0, 1, 0, 1, 0, 0, 0, 0)),
    "malformed": ("no", (0,) * 10),
}


@pytest.mark.parametrize("completion, values", DIAGNOSTICS.values(), ids=DIAGNOSTICS.keys())
def test_diagnostics_by_hand(completion, values):
    result = score(completion, TRUTH).diagnostics
    names = ["overlap", "span_ratio", "one_step", "invalid_boxes", "out_of_frame", "copied", "think_gap"]
    assert list(result) == [*names, "tiou", "viou_think", "viou_pred"]
    assert tuple(result.values()) == pytest.approx(values, abs=1e-12)


def test_a_box_that_ends_at_the_edge_is_in_the_frame():
    """In a frame of 400 x 200 only the last of four reaches beyond it."""
    boxes = {4: "0, 0, 400, 200", 5: "300, 0, 400, 100", 6: "0, 100, 100, 200", 7: "0, 0, 100, 201"}
    assert score(text(4, 7, boxes), TRUTH, scale=(400, 200)).diagnostics["out_of_frame"] == 1 / 4


MIXED = text(6, 9, steps(6, 9, AWAY), steps(6, 9, GOOD))  # 1, 1, 1/3, away, 1, 1 - away


@pytest.mark.parametrize(
    "weights, total",
    [
        ({}, 2 + 1 / 3 + away + 1 + 0.5 * (1 - away)),
        ({"think": 0}, 2 + 1 / 3 + away + 1),  # Table 6
        ({"l1": 0.0}, 2 + 1 / 3 + (-1 / 3 + 1) + 0.5 * (4 / 3)),  # Table 7: GIoU only
        ({"giou": 0.0}, 2 + 1 / 3 + (-0.8 + 0) + 0.5 * 0.8),  # Table 7: L1 only
        ({"think": 1.0}, 2 + 1 / 3 + 2),  # Table 8; the thinking boxes cancel
        ({"format": 2, "consistency": 3, "temporal": 6, "spatial": 0, "think": 0}, 2 + 3 + 2),
        ({"spatial": 2.0, "think": 0.0}, 2 + 1 / 3 + 2 * (away + 1)),
    ],
)
def test_weights(weights, total):
    terms = score(MIXED, TRUTH, weights=weights).rewards
    assert terms["total"] == pytest.approx(total, abs=1e-12)
    assert [*terms.values()][:3] == [1, 1, 1 / 3]  # terms are not weighted


def test_the_script_writes_the_same_lines_with_rewards(tmp_path, capsys):
    """As the README says: lines in, the same lines out with "rewards", the means on stderr."""
    boxes = {str(step): list(box) for step, box in TRUTH.boxes.items()}
    record = {"id": "a", "truth": {"span": [4, 7], "boxes": boxes}, "scale": [1000, 1000], "think": True}
    lines = [record | {"completion": completion} for completion in (text(4, 7, RIGHT), "no answer")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "half.yaml").write_text("rewards: {format: 0.5}")
    main([str(tmp_path / "answers.jsonl"), str(tmp_path / "half.yaml")])
    out, err = capsys.readouterr()
    scored = [json.loads(line) for line in out.splitlines()]
    assert [s.pop("rewards")["total"] for s in scored] == [4.5, 0] and scored == lines
    assert dict(line.split() for line in err.splitlines())["total"] == "2.250"
