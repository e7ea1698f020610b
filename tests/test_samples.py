"""The time grid against its definition, in exact fractions and by looking at every frame."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracks import track_of

from samples import TimeGrid, Truth

RATES = [(Fraction(r), float(Fraction(r))) for r in ("10", "12.5", "15", "24", "25", "29.97", "30", "60")]
RATES += [(Fraction(30000, 1001), 30000 / 1001), (Fraction(24000, 1001), 23.976023976023978)]
STEPS = [Fraction(1, 2), Fraction(1), Fraction(1, 3), Fraction(1, 5), Fraction(2)]


@pytest.mark.parametrize("rate, fps", RATES, ids=lambda value: f"{float(value):g}")
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("num_frames", [1, 7, 30, 301])
def test_grid_against_its_definition(rate, fps, step, num_frames):
    grid = TimeGrid(num_frames, fps, float(step))
    frames = range(num_frames)
    begins = [i * step for i in range(10 * num_frames) if i * step < num_frames / rate]
    assert grid.num_steps == len(begins)
    for i, begin in enumerate(begins):
        assert grid.sampled_frame(i) == max(f for f in frames if f / rate <= begin)
        assert grid.first_frame(i) == min((f for f in frames if f / rate >= begin), default=num_frames)
    cells = [range(grid.first_frame(i), grid.first_frame(i + 1)) for i in range(grid.num_steps)]
    assert [f for cell in cells for f in cell] == list(frames)  # every frame is in exactly one step


@given(st.sampled_from(RATES), st.sampled_from(STEPS), st.integers(1, 70), st.data())
def test_steps_of_a_span_by_brute_force(rate, step, num_frames, data):
    """Of all pairs of edges around a piece of the truth the nearest one. Of all spans in whole steps the best
    one is among spans_near."""
    exact, fps = rate
    first = data.draw(st.integers(0, num_frames - 1))
    stop = data.draw(st.integers(first + 1, num_frames))
    grid, end = TimeGrid(num_frames, fps, float(step)), num_frames / exact
    edges = [*(i * step for i in range(10 * num_frames) if i * step < end), end]
    pairs = list(combinations(range(len(edges)), 2))

    def distance(pair):
        return sum(abs(edges[edge] - frame / exact) for edge, frame in zip(pair, (first, stop), strict=True))

    meeting = [(i, j) for i, j in pairs if edges[i] < stop / exact and edges[j] > first / exact]
    begin, stop_edge = min(meeting, key=lambda pair: (distance(pair), pair[0] - pair[1]))
    assert grid.steps_of(first, stop) == (begin, stop_edge - 1)

    def tiou(pair):
        answered = {f for f in range(num_frames) if edges[pair[0]] <= f / exact < edges[pair[1]]}
        truth = set(range(first, stop))
        return Fraction(len(answered & truth), len(answered | truth))

    near = grid.spans_near(first, stop)
    assert 1 <= len(near) <= 4 and (begin, stop_edge - 1) in near
    assert max(tiou((first, last + 1)) for first, last in near) == max(map(tiou, pairs))


def test_grid_by_hand():
    grid = TimeGrid(100, 25.0, 0.5)  # 4 s; steps begin at frames 0, 12.5, 25, ...
    assert grid.num_steps == 8
    assert [grid.sampled_frame(i) for i in range(8)] == [0, 12, 25, 37, 50, 62, 75, 87]
    assert [grid.first_frame(i) for i in range(9)] == [0, 13, 25, 38, 50, 63, 75, 88, 100]
    assert grid.steps_of(12, 51) == (1, 3)
    assert grid.steps_of(13, 25) == (1, 1)  # no sampled frame inside
    assert grid.steps_of(17, 22) == (1, 1) and grid.steps_of(9, 15) == (0, 0)  # shorter than a step
    assert TimeGrid(100, 20.0, 0.5).steps_of(15, 35) == (1, 3)  # half a step off: the longer span
    assert TimeGrid(94, 25.0, 0.5).steps_of(60, 93) == (5, 7)  # the clip's end is an edge
    assert TimeGrid(600, 30.0, 0.5).steps_of(93, 146) == (6, 9)  # 3.10 to 4.87 s: 3.0 to 5.0 s


def test_a_track_reads_like_a_dict():
    boxes = {3: (0.0, 0.0, 1.0, 1.0), 5: (0.1, 0.2, 0.3, 0.4)}
    track = track_of(boxes)
    assert track == boxes and list(track) == [3, 5] and len(track) == 2 and 4 not in track
    rows = track.rows(np.array([2, 3, 4, 5, 6]))
    assert np.isnan(rows[[0, 2, 4]]).all() and rows[[1, 3]].tolist() == [list(box) for box in boxes.values()]


def test_truth_before_the_end_of_a_video():
    truth = Truth((3, 6), {4: (0, 0, 1, 1), 6: (0, 0, 0.5, 0.5)})
    assert truth.before(7) == truth.before(99) == truth
    assert truth.before(5) == Truth((3, 4), {4: (0, 0, 1, 1)})
    assert truth.before(4) == Truth((3, 3), {3: (0, 0, 1, 1)})  # it has begun: the first box there is
    assert truth.before(3) is None and truth.before(0) is None
