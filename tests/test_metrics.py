"""The metrics of evaluate.py, against cases worked by hand and a slow version in sets and fractions."""

import random
from fractions import Fraction
from itertools import pairwise, product

import pytest

from data import Sample
from evaluate import grid_ceiling, native_scores, summarize, tube_from_answer
from prompts import COORDINATES, TIME_UNITS, Answer, TextFormat, format_answer, parse_answer, truth_answer

NORM = (1000, 1000)
FRAME = TextFormat()  # norm1000, 2 fps: at 20 fps step i is frames 10 i .. 10 i + 9
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def make_sample(first, stop, box=LEFT, num_frames=100, fps=20.0, **changes):
    boxes = dict.fromkeys(range(first, stop), box)
    record = {
        "id": "a.mp4",
        "video": "a.mp4",
        "sentence": "it moves",
        "width": 640,
        "height": 480,
        "num_frames": num_frames,
        "fps": fps,
        "begin_frame": 0,
        "first_frame": first,
        "stop_frame": stop,
        "boxes": boxes,
    }
    return Sample(**{**record, **changes})


def make_answer(start, end, boxes):
    items = tuple(boxes.items()) if isinstance(boxes, dict) else boxes
    return Answer(start, end, items, items)


def tube(answer, sample):
    return tube_from_answer(answer, sample, FRAME, NORM)


# ----------------------------------------------------------------------------------------------------------
# Tubes


def test_cells_and_interpolation_by_hand():
    """Steps 2 and 3 are frames 20 .. 39; from 20 to 30 the box goes right by 100, then it stands still."""
    sample = make_sample(0, 100)
    span, boxes = tube(make_answer(2, 3, {2: (0, 0, 100, 200), 3: (100, 0, 200, 200)}), sample)
    assert span == (20, 40) and list(boxes) == list(range(20, 40))
    assert boxes[20] == (0.0, 0.0, 0.1, 0.2)
    assert boxes[25] == pytest.approx((0.05, 0.0, 0.15, 0.2))
    assert boxes[29] == pytest.approx((0.09, 0.0, 0.19, 0.2))
    assert boxes[30] == boxes[39] == (0.1, 0.0, 0.2, 0.2)  # held to the end of the last cell


def test_cells_of_an_odd_frame_rate():
    """25 fps: step 1 begins at frame 12.5, so it covers 13 .. 24, but its box is that of frame 12."""
    sample = make_sample(0, 50, num_frames=50, fps=25.0)
    span, boxes = tube(make_answer(1, 2, {1: (0, 0, 100, 100), 2: (130, 0, 230, 100)}), sample)
    assert span == (13, 38)
    assert boxes[13][0] == pytest.approx(0.01) and boxes[24][0] == pytest.approx(0.12)
    assert boxes[25][0] == boxes[37][0] == 0.13


def test_steps_without_a_box():
    """Between boxes the way is straight (30 is half way from 20 to 40); before and after they are held."""
    sample = make_sample(0, 100)
    _, boxes = tube(make_answer(1, 6, {2: (0, 0, 100, 100), 4: (200, 0, 300, 100)}), sample)
    assert [round(boxes[frame][0], 9) for frame in (10, 19, 20, 30, 40, 69)] == [0, 0, 0, 0.1, 0.2, 0.2]


def test_boxes_out_of_place():
    """Only the first box of a step counts, none outside the answer's own span, none after the clip's end."""
    sample = make_sample(0, 100)  # steps 0 .. 9
    items = ((8, (0, 0, 100, 100)), (8, (500, 0, 600, 100)), (7, (9, 9, 10, 10)), (10, (900, 0, 999, 9)))
    span, boxes = tube(make_answer(8, 99999, items), sample)
    assert span == (80, 100)
    assert set(boxes.values()) == {(0.0, 0.0, 0.1, 0.1)}
    span, boxes = tube(make_answer(8, 9, {7: (0, 0, 100, 100)}), sample)
    assert (span, boxes) == ((80, 100), {})
    assert native_scores((span, boxes), sample) == {"tIoU": 0.2, "vIoU": 0.0, "failures": 0}


def test_answer_after_the_clip_is_wrong_but_no_failure():
    sample = make_sample(0, 100)
    span, boxes = tube(make_answer(10, 99999, {10: (0, 0, 500, 1000)}), sample)
    assert span == (100, 100) and boxes == {}
    assert native_scores((span, boxes), sample) == {"tIoU": 0.0, "vIoU": 0.0, "failures": 0}


def test_failures():
    sample = make_sample(0, 100)
    assert tube(None, sample) is None
    assert tube(parse_answer("I see a man."), sample) is None
    assert tube(make_answer(5, 4, {4: (0, 0, 1, 1)}), sample) is None
    assert native_scores(None, sample) == {"tIoU": 0.0, "vIoU": 0.0, "failures": 1}


def test_either_list():
    answer = Answer(0, 0, ((0, (0, 0, 500, 1000)),), ((0, (500, 0, 1000, 1000)),))
    sample = make_sample(0, 10)
    scores = [
        native_scores(tube_from_answer(answer, sample, FRAME, NORM, which), sample)
        for which in ("think", "pred")
    ]
    assert [score["vIoU"] for score in scores] == [1.0, 0.0]


# ----------------------------------------------------------------------------------------------------------
# Scores


LEFT_TEXT, WIDE_TEXT = (0, 0, 500, 1000), (0, 0, 1000, 1000)  # IoU with LEFT: 1 and 1/2


@pytest.mark.parametrize(
    ("truth", "steps", "box", "tiou", "viou"),
    [
        ((20, 40), (2, 3), LEFT_TEXT, 1, 1),
        ((20, 40), (2, 3), WIDE_TEXT, 1, Fraction(1, 2)),
        ((20, 40), (4, 5), LEFT_TEXT, 0, 0),  # disjoint, adjacent
        ((20, 40), (8, 9), LEFT_TEXT, 0, 0),  # disjoint, far away
        ((20, 60), (3, 3), LEFT_TEXT, Fraction(10, 40), Fraction(10, 40)),  # inside
        ((25, 30), (1, 4), LEFT_TEXT, Fraction(5, 40), Fraction(5, 40)),  # around
        ((25, 45), (3, 5), LEFT_TEXT, Fraction(15, 35), Fraction(15, 35)),  # partial: 30..44 of 25..59
        ((25, 45), (3, 5), WIDE_TEXT, Fraction(15, 35), Fraction(15, 70)),
        ((33, 34), (3, 3), LEFT_TEXT, Fraction(1, 10), Fraction(1, 10)),  # one native frame
        ((90, 100), (9, 500), LEFT_TEXT, 1, 1),  # nothing exists after the clip's end
        ((0, 100), (0, 9), (500, 0, 0, 1000), 1, 0),  # flipped boxes have no inside
    ],
)
def test_scores_by_hand(truth, steps, box, tiou, viou):
    sample = make_sample(*truth)
    scores = native_scores(tube(make_answer(*steps, dict.fromkeys(steps, box)), sample), sample)
    assert scores == {"tIoU": pytest.approx(float(tiou)), "vIoU": pytest.approx(float(viou)), "failures": 0}


def test_truth_frames_without_a_box_are_not_judged():
    """Truth 20 .. 39 with boxes on 20 .. 29; answer 20 .. 49: 10 of 30 frames are not judged, 10 hit."""
    sample = make_sample(20, 40, boxes=dict.fromkeys(range(20, 30), LEFT))
    scores = native_scores(tube(make_answer(2, 4, {2: LEFT_TEXT}), sample), sample)
    assert scores == {"tIoU": pytest.approx(20 / 30), "vIoU": pytest.approx(10 / 20), "failures": 0}


def test_summary():
    """Failures stay in every mean, and a tie with a threshold is not above it."""
    vious = [0.3, 0.3000001, 0.5, 0.9, 0.0]
    scores = [{"tIoU": 0.5, "vIoU": viou, "failures": 0} for viou in vious[:4]]
    scores.append({"tIoU": 0.0, "vIoU": 0.0, "failures": 1})
    row = summarize(scores)
    assert list(row) == ["m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "N", "failures"]
    expected = {
        "m_tIoU": 40,
        "m_vIoU": 100 * sum(vious) / 5,
        "vIoU@0.3": 60,
        "vIoU@0.5": 20,
        "N": 5,
        "failures": 1,
    }
    assert row == pytest.approx(expected)
    with pytest.raises(ValueError, match="the split is empty"):
        summarize([])


# ----------------------------------------------------------------------------------------------------------
# Against a slow version: sets of frames, exact fractions


def slow_iou(a, b):
    if a[0] >= a[2] or a[1] >= a[3]:
        return 0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_box(frame, keys):
    """The box of a frame among (sampled frame, box) pairs: between its neighbours, or the nearest end."""
    if frame <= keys[0][0]:
        return keys[0][1]
    for (before, a), (after, b) in pairwise(keys):
        if before <= frame <= after:
            share = Fraction(frame - before, after - before)
            return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))
    return keys[-1][1]


def slow_scores(answer, sample, step, scale):
    """step: Fraction seconds. Cells and sampled frames by their definition, frame by frame."""
    fps = Fraction(sample.fps)
    frames = range(sample.num_frames)
    predicted = {f for f in frames if answer.start * step <= f / fps < (answer.end + 1) * step}
    keys = {}
    for i, box in answer.pred:
        if answer.start <= i <= answer.end and i * step < sample.num_frames / fps and i not in keys:
            on_screen = max(f for f in frames if f / fps <= i * step)
            keys[i] = (on_screen, tuple(min(Fraction(v, scale[k % 2]), 1) for k, v in enumerate(box)))
    keys = [keys[i] for i in sorted(keys)]
    truth = set(range(sample.first_frame, sample.stop_frame))
    total = 0
    for f in predicted & truth & set(sample.boxes):
        if keys:
            total += slow_iou(slow_box(f, keys), tuple(map(Fraction, sample.boxes[f])))
    judged = {f for f in predicted | truth if f not in truth or f in sample.boxes}
    return len(predicted & truth) / len(predicted | truth), float(total / len(judged))


def random_box(rng):
    x, y = sorted(rng.sample(range(1001), 2)), sorted(rng.sample(range(1001), 2))
    return (x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("seed", range(60))
def test_against_the_slow_version(seed):
    rng = random.Random(seed)
    num_frames, fps = rng.randint(5, 90), rng.choice([10, 12.5, 20, 23.75, 25, 30])
    first = rng.randrange(num_frames)
    stop = rng.randint(first + 1, num_frames)
    boxes = {f: tuple(v / 1000 for v in random_box(rng)) for f in range(first, stop) if rng.random() < 0.8}
    sample = make_sample(first, stop, num_frames=num_frames, fps=fps, boxes=boxes or {first: LEFT})
    text_format = TextFormat(time_unit=rng.choice(TIME_UNITS), fps=rng.choice([2.0, 4.0]))
    step = Fraction(text_format.step_seconds)
    steps = sample.grid(text_format.step_seconds).num_steps
    for _ in range(5):
        start = rng.randrange(steps)
        end = rng.randint(start, steps + 2)
        named = [rng.randint(start, end + 1) for _ in range(rng.randint(1, 8))]
        answer = make_answer(start, end, tuple((i, random_box(rng)) for i in named))
        scores = native_scores(tube_from_answer(answer, sample, text_format, NORM), sample)
        assert (scores["tIoU"], scores["vIoU"]) == pytest.approx(
            slow_scores(answer, sample, step, NORM), abs=1e-12
        )


# ----------------------------------------------------------------------------------------------------------
# Round trip: the truth, written, read and scored, reaches what the grid of steps allows, and no less


def slow_truth_steps(sample, step):
    """Steps whose frame on screen lies in the truth; where there is none, the step the truth begins in."""
    fps = Fraction(sample.fps)
    times = [i * step for i in range(1000) if i * step < sample.num_frames / fps]
    shown = [max(f for f in range(sample.num_frames) if f / fps <= time) for time in times]
    inside = [i for i, f in enumerate(shown) if sample.first_frame <= f < sample.stop_frame]
    return inside or [max(i for i, time in enumerate(times) if time <= sample.first_frame / fps)]


@pytest.mark.parametrize(("coordinates", "time_unit"), list(product(COORDINATES, TIME_UNITS)))
def test_round_trip(coordinates, time_unit):
    """Quarters of the frame lie on every text grid (file 640 x 480, shown 336 x 252), so the boxes come
    back exactly and vIoU, too, is what the grid of steps leaves: frames of P and G / of P or G."""
    text_format = TextFormat(coordinates=coordinates, time_unit=time_unit)
    step = Fraction(text_format.step_seconds)
    scale = text_format.scale((336, 252), (640, 480))
    rng = random.Random(0)
    samples, ceilings = [], []
    for _ in range(60):
        num_frames, fps = rng.choice([(100, 20), (120, 25), (75, 23.75)])
        first = rng.randrange(num_frames)
        sample = make_sample(
            first, rng.randint(first + 1, num_frames), (0.25, 0.5, 0.75, 1.0), num_frames=num_frames, fps=fps
        )
        truth = sample.truth(text_format.step_seconds)
        text = format_answer(truth_answer(truth, scale))
        scores = native_scores(tube_from_answer(parse_answer(text), sample, text_format, scale), sample)

        steps = slow_truth_steps(sample, step)
        assert truth.span == (steps[0], steps[-1])
        frames, fps = set(range(num_frames)), Fraction(fps)
        predicted = {f for f in frames if steps[0] * step <= f / fps < (steps[-1] + 1) * step}
        annotated = set(range(sample.first_frame, sample.stop_frame))
        ceiling = len(predicted & annotated) / len(predicted | annotated)
        assert scores == {"tIoU": pytest.approx(ceiling), "vIoU": pytest.approx(ceiling), "failures": 0}
        samples.append(sample)
        ceilings.append(ceiling)
    assert grid_ceiling(samples, text_format)["m_tIoU"] == pytest.approx(100 * sum(ceilings) / len(ceilings))


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_round_trip_of_a_moving_box(coordinates):
    """A truth that begins and ends with steps and moves evenly loses nothing but the rounding of its boxes,
    and the second half of the last cell, where the box is held: checked against the slow version."""
    text_format = TextFormat(coordinates=coordinates)
    scale = text_format.scale((336, 252), (640, 480))
    boxes = {f: (f / 200, 0.25, f / 200 + 0.5, 0.75) for f in range(20, 60)}
    sample = make_sample(20, 60, boxes=boxes)
    answer = parse_answer(format_answer(truth_answer(sample.truth(0.5), scale)))
    scores = native_scores(tube_from_answer(answer, sample, text_format, scale), sample)
    assert (scores["tIoU"], scores["vIoU"]) == pytest.approx(
        slow_scores(answer, sample, Fraction(1, 2), scale)
    )
    assert scores["tIoU"] == 1 and 0.97 < scores["vIoU"] < 1
