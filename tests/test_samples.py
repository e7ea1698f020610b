"""The time grid against its definition, in exact fractions and by looking at every frame."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.sampled_from(RATES), st.sampled_from(STEPS), st.integers(1, 200), st.data())
def test_steps_of_a_span_against_their_definition(rate, step, num_frames, data):
    exact, fps = rate
    first = data.draw(st.integers(0, num_frames - 1))
    stop = data.draw(st.integers(first + 1, num_frames))
    begins = [i * step for i in range(10 * num_frames) if i * step < num_frames / exact]
    shown = [max(f for f in range(num_frames) if f / exact <= begin) for begin in begins]
    inside = [i for i, frame in enumerate(shown) if first <= frame < stop]
    if not inside:  # between two samples: the last step that has begun
        inside = [max(i for i, begin in enumerate(begins) if begin <= first / exact)]
    assert TimeGrid(num_frames, fps, float(step)).steps_of(first, stop) == (inside[0], inside[-1])


def test_grid_by_hand():
    grid = TimeGrid(100, 25.0, 0.5)  # 4 s; steps begin at frames 0, 12.5, 25, ...
    assert grid.num_steps == 8
    assert [grid.sampled_frame(i) for i in range(8)] == [0, 12, 25, 37, 50, 62, 75, 87]
    assert [grid.first_frame(i) for i in range(9)] == [0, 13, 25, 38, 50, 63, 75, 88, 100]
    assert grid.steps_of(12, 51) == (1, 4)
    assert grid.steps_of(13, 25) == (1, 1)  # no sampled frame inside


def test_truth_before_the_end_of_a_video():
    truth = Truth((3, 6), {4: (0, 0, 1, 1), 6: (0, 0, 0.5, 0.5)})
    assert truth.before(7) == truth.before(99) == truth
    assert truth.before(5) == Truth((3, 4), {4: (0, 0, 1, 1)})
    assert truth.before(4) is None and truth.before(0) is None
