"""The metrics, against cases worked by hand and a slow version in sets and fractions."""

import math
import random
from fractions import Fraction
from itertools import pairwise
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracks import track_of

from metrics import (
    AREA_EDGES,
    PROTOCOLS,
    format_table,
    grid_frames,
    grid_scores,
    ious,
    native_scores,
    score_answers,
    stcat_scores,
    summarize,
    tube_from_answer,
    tubedetr_frames,
    tubedetr_scores,
    viou_by_area,
    vue_scores,
    whole_step_scores,
)
from prompts import TIME_UNITS, Answer, TextFormat, parse_answer
from rewards import iou
from samples import QUESTION_TYPES, Sample, Track

NORM = (1000, 1000)
FRAME = TextFormat()  # norm1000, 2 fps: at 20 fps step i is frames 10 i .. 10 i + 9
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def make_sample(first, stop, box=LEFT, num_frames=100, fps=20.0, **changes):
    boxes = dict.fromkeys(range(first, stop), box)
    record = {"id": "a.mp4", "video": "a.mp4", "sentence": "it moves", "width": 640, "height": 480}
    record |= {"num_frames": num_frames, "file_frames": num_frames, "fps": fps, "begin_frame": 0}
    record |= {"first_frame": first, "stop_frame": stop, "boxes": boxes} | changes
    return Sample(**{**record, "boxes": track_of(record["boxes"])})


def make_answer(start, end, boxes):
    items = tuple(boxes.items()) if isinstance(boxes, dict) else boxes
    return Answer(start, end, items, items)


def tube(answer, sample):
    return tube_from_answer(answer, sample, FRAME, NORM)


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


def test_failures():
    sample = make_sample(0, 100)
    assert tube(None, sample) is None
    assert tube(parse_answer("I see a man."), sample) is None
    assert tube(make_answer(5, 4, {4: (0, 0, 1, 1)}), sample) is None
    assert native_scores(None, sample) == {"tIoU": 0.0, "vIoU": 0.0, "failures": 1}


def test_either_list_of_boxes():
    answer = Answer(0, 0, ((0, (0, 0, 500, 1000)),), ((0, (500, 0, 1000, 1000)),))
    sample = make_sample(0, 10)
    for which, viou in (("think", 1), ("pred", 0)):
        assert native_scores(tube_from_answer(answer, sample, FRAME, NORM, which), sample)["vIoU"] == viou


LEFT_TEXT, WIDE_TEXT = (0, 0, 500, 1000), (0, 0, 1000, 1000)  # IoU with LEFT: 1 and 1/2


@pytest.mark.parametrize(
    ("truth", "steps", "box", "tiou", "viou"),
    [
        ((20, 40), (2, 3), LEFT_TEXT, 1, 1),
        ((25, 45), (3, 5), WIDE_TEXT, Fraction(15, 35), Fraction(15, 70)),  # 30..44 of 25..59
        ((90, 100), (9, 500), LEFT_TEXT, 1, 1),  # nothing exists after the clip's end
        ((0, 100), (10, 99999), LEFT_TEXT, 0, 0),  # wrong, but no failure
        ((0, 100), (0, 9), (500, 0, 0, 1000), 1, 0),  # flipped boxes have no inside
    ],
)
def test_scores_by_hand(truth, steps, box, tiou, viou):
    sample = make_sample(*truth)
    scores = native_scores(tube(make_answer(*steps, dict.fromkeys(steps, box)), sample), sample)
    assert scores == {"tIoU": pytest.approx(float(tiou)), "vIoU": pytest.approx(float(viou)), "failures": 0}


def every_box(span, box=LEFT):
    return span, Track(span[0], np.full((span[1] - span[0], 4), box))


@pytest.mark.parametrize(
    ("truth", "span", "native", "hcstvg", "vidstg", "tubedetr", "vue", "grid"),
    [
        # 20 fps, 100 frames: TubeDETR's frames are 0, 4, ..., 96. Each column: tIoU, vIoU of a right box.
        # stcat's truth lacks its last frame for HC-STVG, and the clip's last frame (99) for VidSTG.
        # vue knows 0, 20, .., 80, and grid 0, 11, .., 99; tIoU and vIoU of a right box are the same there.
        # found exactly; TubeDETR's 20, 24, .., 36
        ((20, 40), (20, 40), (1, 1), ("19/20", "19/20"), (1, 1), (1, 1), 1, 1),
        # found exactly, at the clip's end; 92, 96; after the last whole second
        ((90, 100), (90, 100), (1, 1), ("9/10", "9/10"), ("9/10", "9/10"), (1, 1), 0, 1),
        # disjoint, adjacent and far
        ((20, 40), (40, 60), (0, 0), (0, 0), (0, 0), (0, 0), 0, 0),
        ((20, 40), (0, 10), (0, 0), (0, 0), (0, 0), (0, 0), 0, 0),
        # inside: 32, 36 of 20, 24, .., 56; none of 20, 40; 33 of 22, 33, 44, 55
        (
            (20, 60),
            (30, 40),
            ("10/40", "10/40"),
            ("10/39", "10/39"),
            ("10/40",) * 2,
            ("10/40", "2/10"),
            0,
            "1/4",
        ),
        # around: 28 of 12, 16, .., 48; nothing is left of the truth
        ((25, 30), (10, 50), ("5/40", "5/40"), ("4/40", "4/40"), ("5/40", "5/40"), ("5/40", "1/10"), 0, 0),
        # partial, the answer is late: 30..44 of 25..59; 32, 36, 40, 44 of 28, .., 56; 33, 44 of 33, 44, 55
        (
            (25, 45),
            (30, 60),
            ("15/35",) * 2,
            ("14/35", "14/35"),
            ("15/35", "15/35"),
            ("15/35", "4/8"),
            1,
            "2/3",
        ),
        # partial, the answer is early: 25..29 of 10..44 (HC-STVG: 10..43); 28 of 12, 16, .., 44; 20 and 40
        ((25, 45), (10, 30), ("5/35", "5/35"), ("5/34", "5/34"), ("5/35", "5/35"), ("5/35", "1/9"), 0, 0),
        # one frame of truth, between TubeDETR's, and on one of them: 32 of 32, 36; PTD's 33
        ((33, 34), (30, 40), ("1/10", "1/10"), (0, 0), ("1/10", "1/10"), ("1/10", 0), 0, 1),
        ((32, 33), (30, 40), ("1/10", "1/10"), (0, 0), ("1/10", "1/10"), ("1/10", "1/2"), 0, 0),
        # one frame of truth, found: nothing is left for HC-STVG; none of TubeDETR's frames in P or G
        ((33, 34), (33, 34), (1, 1), (0, 0), (1, 1), (1, 0), 0, 1),
        # one frame of truth, the clip's last
        ((99, 100), (99, 100), (1, 1), (0, 0), (0, 0), (1, 0), 0, 1),
        # an answer beyond the clip's end
        ((90, 100), (100, 100), (0, 0), (0, 0), (0, 0), (0, 0), 0, 0),
    ],
)
@pytest.mark.parametrize(("box", "right"), [(LEFT, 1), ((0, 0, 1, 1), 0.5), (RIGHT, 0)])
def test_protocols_by_hand(truth, span, native, hcstvg, vidstg, tubedetr, vue, grid, box, right):
    tube = every_box(span, box)
    for question_type, stcat in ((None, hcstvg), ("declarative", vidstg), ("interrogative", vidstg)):
        sample = make_sample(*truth, question_type=question_type)
        figures = {
            "native": native,
            "stcat": stcat,
            "tubedetr": tubedetr,
            "vue": (vue,) * 2,
            "grid": (grid,) * 2,
        }
        for name, pair in figures.items():
            tiou, viou = (float(Fraction(figure)) for figure in pair)
            expected = {"tIoU": tiou, "vIoU": right * viou, "failures": 0}
            expected |= {"vIoU_common": right} if name == "vue" and tiou else {}
            assert PROTOCOLS[name](tube, sample) == pytest.approx(expected), (name, question_type)


def test_holes_in_all_protocols():
    """Truth 20 .. 39 with boxes on 20 .. 29, answer 20 .. 49: boxes are judged on 20 .. 29 and 40 .. 49.

    tIoU knows no holes. stcat, HC-STVG: the truth ends before 39, which the answer has, but 39 stays a hole.
    tubedetr: 20, 24, 28 and 40, 44, 48. vue: 20 of 20, 40. grid: 22 of 22, 33, 44; the hole 33 counts.
    """
    boxes = dict.fromkeys(range(20, 30), LEFT)
    samples = [make_sample(20, 40, boxes=boxes, question_type=kind) for kind in (None, "declarative")]
    tube = every_box((20, 50))
    both = [{name: protocol(tube, sample) for name, protocol in PROTOCOLS.items()} for sample in samples]
    for scores, stcat in zip(both, (19 / 30, 20 / 30), strict=True):
        assert scores["native"] == {"tIoU": 20 / 30, "vIoU": 10 / 20, "failures": 0}
        assert scores["stcat"] == {"tIoU": stcat, "vIoU": 10 / 20, "failures": 0}
        assert scores["tubedetr"] == {"tIoU": 20 / 30, "vIoU": 3 / 6, "failures": 0}
        assert scores["vue"] == {"tIoU": 1 / 2, "vIoU": 1 / 2, "failures": 0, "vIoU_common": 1}
        assert scores["grid"] == {"tIoU": 1 / 3, "vIoU": 1 / 3, "failures": 0}


def test_what_a_box_is_for_vue_and_grid():
    """Truth 0 .. 99 with a hole at 20 .. 40: vue has 0, 60, 80 of it, grid 0, 11, 44, 55, .., 99.

    Corners in the wrong order are sorted. A box without an inside is a box for grid, and none for vue. The
    truth of grid is in thousandths. A hole of the truth is, between two boxes, a part of the event for grid.
    """
    boxes = {f: (0.0, 0.0, 0.5004, 1.0) for f in range(100) if not 20 <= f <= 40}
    sample, flipped = make_sample(0, 100, boxes=boxes), every_box((0, 100), (0.5, 1.0, 0.0, 0.0))
    assert native_scores(flipped, sample)["vIoU"] == 0
    share = 0.5 / 0.5004
    found = {"tIoU": 3 / 5, "vIoU": 3 / 5 * share, "vIoU_common": share, "failures": 0}
    assert vue_scores(flipped, sample) == pytest.approx(found)
    assert grid_scores(flipped, sample) == pytest.approx({"tIoU": 1, "vIoU": 8 / 10, "failures": 0})
    assert grid_scores(every_box((20, 42)), sample) == {"tIoU": 2 / 10, "vIoU": 0, "failures": 0}
    flat = every_box((0, 100), (0.2, 0.0, 0.2, 1.0))
    assert vue_scores(flat, sample) == {"tIoU": 0, "vIoU": 0, "failures": 0}
    assert grid_scores(flat, sample) == {"tIoU": 1, "vIoU": 0, "failures": 0}


@st.composite
def tubes_without_holes(draw):
    """(tube, sample): a box in each frame of both, at one frame a second; and the same, each of its frames
    shown for so many frames."""
    box = st.tuples(*[st.integers(0, 50)] * 2).map(lambda p: (p[0] / 100, p[1] / 100, p[0] / 100 + 0.5, 1.0))
    num_frames, times = draw(st.integers(1, 20)), draw(st.integers(1, 30))
    pairs = []
    spans = [sorted(draw(st.tuples(*[st.integers(0, num_frames)] * 2))) for _ in range(2)]
    (first, stop), span = spans
    first = min(first, num_frames - 1)
    true, given = ([draw(box) for _ in range(num_frames)] for _ in range(2))
    for n in (1, times):
        boxes = {f: true[f // n] for f in range(first * n, max(stop, first + 1) * n)}
        sample = make_sample(min(boxes), max(boxes) + 1, num_frames=num_frames * n, fps=float(n), boxes=boxes)
        own = np.array([given[f // n] for f in range(span[0] * n, span[1] * n)]).reshape(-1, 4)
        pairs.append((((span[0] * n, span[1] * n), Track(span[0] * n, own)), sample))
    return pairs


@settings(deadline=None, max_examples=100)
@given(tubes_without_holes())
def test_vue_is_native_without_holes(pairs):
    """At one frame a second; and at any whole number of them, if spans and boxes change at whole seconds."""
    for tube, sample in pairs:
        vue, native = vue_scores(tube, sample), native_scores(tube, sample)
        assert (vue["tIoU"], vue["vIoU"]) == pytest.approx((native["tIoU"], native["vIoU"]), abs=1e-12)
        assert native["tIoU"] * vue.get("vIoU_common", 0) == pytest.approx(native["vIoU"], abs=1e-12)


def test_a_segment_of_a_file():
    """TubeDETR counts frames from the file's start, at 20 fps multiples of 4: a clip from 37 is judged at its
    first frame, then at 40, 44, ..., which are 3, 7, ... of the clip. Truth 3 .. 22, answer 3 .. 12: 3, 7, 11
    of 3, 7, .., 19. The other two do not care."""
    sample = make_sample(3, 23, begin_frame=37, file_frames=300, question_type="declarative")
    assert tubedetr_frames(sample)[:4].tolist() == [0, 3, 7, 11]
    tube = every_box((3, 13))
    assert tubedetr_scores(tube, sample) == {"tIoU": 10 / 20, "vIoU": 3 / 5, "failures": 0}
    assert stcat_scores(tube, sample) == {"tIoU": 10 / 20, "vIoU": 10 / 20, "failures": 0}
    assert native_scores(tube, sample) == {"tIoU": 10 / 20, "vIoU": 10 / 20, "failures": 0}


@pytest.mark.parametrize("protocol", PROTOCOLS.values())
@pytest.mark.parametrize("question_type", [None, "declarative"])
def test_failed_and_empty_answers(protocol, question_type):
    sample = make_sample(20, 40, question_type=question_type)
    assert protocol(None, sample) == {"tIoU": 0, "vIoU": 0, "failures": 1}
    nothing = Track(0, np.empty((0, 4)))
    assert protocol(((100, 100), nothing), sample) == {"tIoU": 0, "vIoU": 0, "failures": 0}
    no_boxes = protocol(((20, 40), nothing), sample)
    assert no_boxes["vIoU"] == 0 and no_boxes["failures"] == 0
    assert no_boxes["tIoU"] == 0 if protocol is vue_scores else no_boxes["tIoU"] >= 0.95


def test_perfect_spans_under_stcat():
    """HC-STVG, events of 20, 10 and 5 frames: (19/20 + 9/10 + 4/5) / 3 = 88.3.

    VidSTG: inside the clip 100; an answer that ends with what their code takes for the last frame, one later,
    has 20/21, 10/11, 5/6 (mean 89.8); the event that reaches the clip's end is like HC-STVG's.
    """
    spans = [(0, 20), (30, 40), (50, 55)]

    def mean_tiou(kind, late=0, shift=0):
        samples = [make_sample(a + shift, b + shift, question_type=kind) for a, b in spans]
        tubes = [every_box((s.first_frame, s.stop_frame + late)) for s in samples]
        return summarize(list(map(stcat_scores, tubes, samples)))["m_tIoU"]

    assert mean_tiou(None) == pytest.approx(100 * (19 / 20 + 9 / 10 + 4 / 5) / 3)
    assert mean_tiou("declarative") == 100
    assert mean_tiou("declarative", late=1) == pytest.approx(100 * (20 / 21 + 10 / 11 + 5 / 6) / 3)
    assert mean_tiou("declarative", shift=45) == pytest.approx(100 * (1 + 1 + 4 / 5) / 3)  # 95 .. 99


@pytest.mark.parametrize(
    ("fps", "num_frames", "begin", "frames"),
    [
        (25.0, 100, 0, [0, 14, 28, 42, 57, 71, 85, 99]),  # 8, at 99 / 7 each
        (3.0, 7, 5, [0, 2, 4, 6]),
        (2.4, 6, 0, [0, 1, 2, 4, 5]),  # 0, 1.25, 2.5, ..: a half goes to the even number
        (2.4, 6, 1, [0, 1, 3, 4, 5]),  # .., 3.5 of the file
        (25.0, 20, 0, [0, 6, 13, 19]),  # at least 4
        (25.0, 2, 0, [0, 1]),
        (25.0, 1, 37, [0]),
        (1.0, 64, 0, list(range(64))),  # at most 64
    ],
)
def test_frames_of_ptd(fps, num_frames, begin, frames):
    sample = make_sample(0, 1, num_frames=num_frames, fps=fps, begin_frame=begin)
    assert grid_frames(sample).tolist() == frames


@pytest.mark.parametrize(
    ("fps", "num_frames", "begin", "frames"),
    [
        (10.0, 20, 0, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (10.0, 19, 0, [0, 2, 4, 6, 8, 10, 12, 14, 16]),  # 18 is the clip's last frame
        (10.0, 10, 37, [0, 1, 3, 5, 7]),  # 37; 38, 40, 42, 44 of the file
        (60.0, 50, 0, [0, 12, 24, 36, 48]),
        (23.976, 31, 0, [0, 5, 10, 15, 20, 24, 29]),  # a fifth of a second is 4.7952 frames, round up
        (29.97, 32, 0, [0, 6, 12, 18, 24, 30]),  # 5.994 frames
        (29.97, 20, 990, [0, 6, 11, 17]),  # 990 (165.2 fifths); 996 (166.2), 1001 (167), 1007 (168.0)
        (3.0, 7, 0, [0, 1, 2, 3, 4, 5]),  # their code refuses files below 5 fps
        (3.0, 4, 37, [0, 1, 2]),
        (5.0, 4, 2, [0, 1, 2]),
        (25.0, 1, 0, [0]),
        (25.0, 1, 37, [0]),
        (25.0, 2, 0, [0]),
    ],
)
def test_frames_of_tubedetr(fps, num_frames, begin, frames):
    sample = make_sample(0, 1, num_frames=num_frames, fps=fps, begin_frame=begin)
    assert tubedetr_frames(sample).tolist() == frames


def test_frames_of_tubedetr_round_as_theirs():
    """HC-STVG of 104 frames: 5 / 5.2 rounds down, so frame 26, where fifth 25 begins, is not yet in it."""
    assert int(26 * 5 / 5.2) == 25 and int(26 * (5 / 5.2)) == 24
    frames = tubedetr_frames(make_sample(0, 1, num_frames=104, fps=5.2))
    assert [f for f in frames if 23 < f < 29] == [24, 25, 27, 28]


def test_at_most_200_frames_of_tubedetr():
    """60 s at 25 fps: 300 frames 0, 5, .., 1495, of which two of three stay, numbers 0, 1, 3, 4, 6, .., 298.
    For the truth 0 .. 59 (0, 5, 15, 20, 30, 35, 45, 50) an answer of 0 .. 29 (0, 5, 15, 20) has 4/8, one of
    0 .. 9 (0, 5) has 2/8 and not 2/12."""
    sample = make_sample(0, 60, num_frames=1500, fps=25.0)
    frames = tubedetr_frames(sample)
    assert len(frames) == 200 and frames[:5].tolist() == [0, 5, 15, 20, 30] and frames[-1] == 5 * 298
    assert tubedetr_scores(every_box((0, 30)), sample)["vIoU"] == 4 / 8
    assert tubedetr_scores(every_box((0, 10)), sample)["vIoU"] == 2 / 8
    assert len(tubedetr_frames(make_sample(0, 1, num_frames=1001, fps=25.0))) == 200  # 0, 5, .., 995: no more
    assert tubedetr_frames(make_sample(0, 1, num_frames=1001, fps=25.0)).tolist() == list(range(0, 1000, 5))


def test_summary():
    """Failures stay in every mean, and a tie with a threshold is not above it."""
    vious = [0.3, 0.3000001, 0.5, 0.9, 0.0]
    scores = [{"tIoU": 0.5, "vIoU": viou, "failures": 0} for viou in vious[:4]]
    scores.append({"tIoU": 0.0, "vIoU": 0.0, "failures": 1})
    row = summarize(scores)
    assert list(row) == ["m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "N", "failures"]
    assert list(row.values()) == pytest.approx([40, 100 * sum(vious) / 5, 60, 20, 5, 1])
    with pytest.raises(ValueError, match="the split is empty"):
        summarize([])


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0, 0.1, 0.3, 0.30001, 0.5, 0.50001, 1]) | st.floats(0, 1), min_size=1))
def test_no_row_has_more_above_a_half_than_above_three_tenths(vious):
    row = summarize([{"tIoU": 1.0, "vIoU": viou, "failures": 0} for viou in vious])
    assert 0 <= row["vIoU@0.5"] <= row["vIoU@0.3"] <= 100
    format_table({"answers": row})


def some_answers(kinds):
    """One sample for each question type, with an answer that is exact, half, failed, exact, half, ..."""
    samples = [make_sample(20 + k, 40 + k, question_type=kind) for k, kind in enumerate(kinds)]
    spans = [
        (s.first_frame, s.first_frame + (20, 10)[k % 3]) if k % 3 < 2 else None for k, s in enumerate(samples)
    ]
    return [span and every_box(span) for span in spans], samples


@pytest.mark.parametrize("kinds", [[None] * 4, [QUESTION_TYPES[k % 2] for k in (0, 1, 1, 0, 1, 1, 1, 0)]])
def test_rows(kinds):
    """The row of each protocol, with the ceiling; that of a question type is what its sentences get alone."""
    tubes, samples = some_answers(kinds)
    result = score_answers(iter(tubes), samples, FRAME)
    assert list(result) == ["native", "stcat", "tubedetr", "vue", "grid"]
    for name, protocol in PROTOCOLS.items():
        row = result[name]
        best = whole_step_scores(samples, FRAME)["best"][name]
        whole = summarize(list(map(protocol, tubes, samples)), name)
        whole |= {"ceiling_m_tIoU": best["m_tIoU"], "ceiling_m_vIoU": best["m_vIoU"]}
        for kind in set(kinds) - {None}:
            chosen = [k for k, sample in enumerate(samples) if sample.question_type == kind]
            parts = ([some[k] for k in chosen] for some in (tubes, samples))
            alone = score_answers(*parts, FRAME)[name]
            assert alone.pop(kind) == alone == row.pop(kind)  # of a single type, its row is the whole row
        assert row == whole
    if None in kinds:
        # Exact, half, none, exact: native (1 + 1/2 + 0 + 1) / 4, stcat (19/20 + 10/19 + 0 + 19/20) / 4
        assert result["native"]["m_tIoU"] == 62.5 and result["native"]["failures"] == 1
        assert result["stcat"]["m_tIoU"] == pytest.approx(100 * (19 / 20 + 10 / 19 + 19 / 20) / 4)


def test_what_counts_as_reached():
    """A vIoU of exactly 0.5 is vIoU@0.5 for `grid` alone; only common seconds count for m_vIoU_common."""
    samples, tubes = [make_sample(20, 60)] * 2, [every_box((20, 60), (0, 0, 1, 1)), every_box((60, 99))]
    rows = score_answers(iter(tubes), samples, FRAME)
    assert {name: row["vIoU@0.5"] for name, row in rows.items()} == dict.fromkeys(PROTOCOLS, 0) | {"grid": 50}
    assert [rows["vue"][key] for key in ("m_tIoU", "m_vIoU", "m_vIoU_common")] == [50, 25, 50]
    assert "m_vIoU_common" not in score_answers(iter(tubes[1:]), samples[1:], FRAME)["vue"]


def test_every_answer_needs_its_sample():
    tubes, samples = some_answers([None] * 3)
    for answers, truths in [(tubes[:2], samples), (tubes, samples[:2])]:
        with pytest.raises(ValueError, match="argument"):
            score_answers(iter(answers), truths, FRAME)


def test_table():
    row = {"m_tIoU": 60.34, "m_vIoU": 44.06, "vIoU@0.3": 73.0, "vIoU@0.5": 43.0, "N": 1160, "failures": 29}
    best = {"ceiling_m_tIoU": 92.3, "ceiling_m_vIoU": 88.88}
    assert format_table({"before": row | {"m_tIoU": 5}, "after": row}).splitlines() == [
        "                m_tIoU    m_vIoU  vIoU@0.3  vIoU@0.5         N    failed",
        "before             5.0      44.1      73.0      43.0      1160      2.5%",
        "after             60.3      44.1      73.0      43.0      1160      2.5%",
    ]
    nested = {kind: row | best | {"N": n} for kind, n in zip(QUESTION_TYPES, (1000, 160), strict=True)}
    expected = """
                            m_tIoU    m_vIoU  vIoU@0.3  vIoU@0.5         N    failed best tIoU best vIoU
    native                    60.3      44.1      73.0      43.0      1160      2.5%      92.3      88.9
    native declarative        60.3      44.1      73.0      43.0      1000      2.9%      92.3      88.9
    native interrogative      60.3      44.1      73.0      43.0       160     18.1%      92.3      88.9
    stcat                     60.3      44.1      73.0      43.0      1160      2.5%         -         -
    """
    assert format_table({"native": row | best | nested, "stcat": row}) == dedent(expected).strip("\n")
    table = format_table({"native": row, "vue": row | {"m_vIoU_common": 61.25}}).splitlines()
    assert [line.split()[-1] for line in table] == ["vIoU_Int", "-", "61.2"]
    for impossible in (row | {"vIoU@0.5": 74.0}, row | {"vIoU@0.5": float("nan")}):
        with pytest.raises(ValueError, match=r"stcat: vIoU@0.5 .* vIoU@0.3 73.0"):
            format_table({"native": row, "stcat": impossible})


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


def slow_tube(answer, sample, step, scale):
    """step: Fraction seconds. Cells and sampled frames by their definition, frame by frame.

    Returns the set of frames of the answer's span, and frame -> box.
    """
    fps = Fraction(sample.fps)
    frames = range(sample.num_frames)
    predicted = {f for f in frames if answer.start * step <= f / fps < (answer.end + 1) * step}
    keys = {}
    for i, box in answer.pred:
        if answer.start <= i <= answer.end and i * step < sample.num_frames / fps and i not in keys:
            on_screen = max(f for f in frames if f / fps <= i * step)
            keys[i] = (on_screen, tuple(min(Fraction(v, scale[k % 2]), 1) for k, v in enumerate(box)))
    keys = [keys[i] for i in sorted(keys)]
    return predicted, {f: slow_box(f, keys) for f in predicted} if keys else {}


def slow_keys(name, predicted, boxes, sample):
    """slow_scores of the two protocols that know boxes only."""
    fps, frames, begin = Fraction(str(sample.fps)), range(sample.num_frames), sample.begin_frame
    if name == "vue":
        shown = {math.ceil(second * fps) for second in frames} & set(frames)
    else:
        count = min(max(int(2 * len(frames) / sample.fps), 4), 64, len(frames))
        way = [Fraction(k * (len(frames) - 1), max(count - 1, 1)) for k in range(count)]
        shown = {round(begin + place) - begin for place in way}
    pairs = [{f: order(box) for f, box in some.items() if f in shown} for some in (boxes, sample.boxes)]
    if name == "vue":
        pairs = [{f: b for f, b in some.items() if b[0] < b[2] and b[1] < b[3]} for some in pairs]
    p, g = pairs
    g = {f: [Fraction(round(1000 * v), 1000) for v in b] for f, b in g.items()} if name == "grid" else g
    total = sum(slow_iou(p[f], g[f]) for f in p.keys() & g.keys())
    viou = float(total / len(p.keys() | g.keys())) if p or g else 0
    p, g = set(p), set(g)
    if name == "grid":
        p, g = predicted & shown, {f for f in shown if g and min(g) <= f <= max(g)}
    return len(p & g) / len(p | g) if p or g else 0, viou


def order(box):
    """The box with its corners sorted, in exact numbers."""
    x, y = sorted([box[0], box[2]]), sorted([box[1], box[3]])
    return tuple(map(Fraction, (x[0], y[0], x[1], y[1])))


def slow_scores(name, predicted, boxes, sample):
    """(tIoU, vIoU). predicted: set of frames; boxes: frame -> box for some of them."""
    if name in ("vue", "grid"):
        return slow_keys(name, predicted, boxes, sample)
    annotated = set(range(sample.first_frame, sample.stop_frame))
    truth, seen = annotated, set(range(sample.num_frames))
    if name == "stcat":
        unearned = max(annotated) if sample.question_type is None else sample.num_frames - 1
        truth = annotated - {unearned}
    if name == "tubedetr":
        fifths = {}  # fifth of a second of the file -> its first frame in the clip
        for f in range(sample.num_frames):
            if f == 0 or f < sample.num_frames - 1:
                fifths.setdefault(int((sample.begin_frame + f) * (5 / sample.fps)), f)
        seen = [fifths[fifth] for fifth in sorted(fifths)]
        if len(seen) > 200:
            kept = {int(Fraction(len(seen), 200) * j) for j in range(200)}
            seen = [f for k, f in enumerate(seen) if k in kept]
    judged = (predicted | truth) & set(seen) - (annotated - set(sample.boxes))
    hits = judged & predicted & truth & set(boxes)
    total = sum(slow_iou(boxes[f], tuple(map(Fraction, sample.boxes[f]))) for f in hits)
    tiou = len(predicted & truth) / len(predicted | truth) if predicted | truth else 0
    return tiou, float(total / len(judged)) if judged else 0


def random_box(rng):
    x, y = sorted(rng.sample(range(1001), 2)), sorted(rng.sample(range(1001), 2))
    return (x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("seed", range(40))
def test_against_the_slow_version(seed):
    rng = random.Random(seed)
    num_frames, fps = rng.randint(5, 90), rng.choice([10, 12.5, 20, 23.75, 25, 30])
    first = rng.randrange(num_frames)
    stop = rng.randint(first + 1, num_frames)
    boxes = {f: tuple(v / 1000 for v in random_box(rng)) for f in range(first, stop) if rng.random() < 0.8}
    about = {"begin_frame": rng.choice([0, 37]), "question_type": rng.choice([None, "declarative"])}
    boxes = boxes or {first: LEFT}
    sample = make_sample(first, stop, num_frames=num_frames, fps=fps, boxes=boxes, **about)
    text_format = TextFormat(time_unit=rng.choice(TIME_UNITS), fps=rng.choice([2.0, 4.0]))
    step = Fraction(text_format.step_seconds)
    steps = sample.grid(text_format.step_seconds).num_steps
    for _ in range(5):
        start = rng.randrange(steps)
        end = rng.randint(start, steps + 2)
        named = [rng.randint(start, end + 1) for _ in range(rng.randint(1, 8))]
        answer = make_answer(start, end, tuple((i, random_box(rng)) for i in named))
        fast = tube_from_answer(answer, sample, text_format, NORM)
        slow = slow_tube(answer, sample, step, NORM)
        for name, protocol in PROTOCOLS.items():
            scores = protocol(fast, sample)
            expected = slow_scores(name, *slow, sample)
            assert (scores["tIoU"], scores["vIoU"]) == pytest.approx(expected, abs=1e-12), name


@st.composite
def tubes_and_samples(draw):
    """Any span, any boxes (or none on some frames), any part of a file: no grid of steps in between."""
    fps = draw(st.sampled_from([3.0, 5.0, 5.2, 10.0, 23.976, 25.0, 29.97, 60.0]))
    num_frames = draw(st.integers(1, 60) | st.just(round(41 * fps)))  # 41 s: more than 200 frames at 5 fps
    first = draw(st.integers(0, num_frames - 1))
    stop = draw(st.integers(first + 1, min(num_frames, first + 40)))
    shifts = draw(st.lists(st.none() | st.integers(0, 50), min_size=stop - first, max_size=stop - first))
    truth = {first + k: (x / 100, 0.0, x / 100 + 0.5, 1.0) for k, x in enumerate(shifts) if x is not None}
    about = {"num_frames": num_frames, "fps": fps, "boxes": truth or {first: LEFT}}
    about |= {"begin_frame": draw(st.sampled_from([0, 1, 37, 479]))}
    about |= {"question_type": draw(st.sampled_from([None, *QUESTION_TYPES]))}
    sample = make_sample(first, stop, **about)
    start = draw(st.integers(max(0, first - 20), min(num_frames, stop + 5)))
    end = draw(st.integers(start, min(num_frames, start + 50)))
    skipped = draw(st.integers(1, 5))
    boxes = {f: (0.25, 0.0, 0.75, 1.0) for f in range(start, end) if f % skipped == 0}
    return ((start, end), track_of(boxes) if boxes else Track(0, np.empty((0, 4)))), sample


@settings(deadline=None, max_examples=50)
@given(tubes_and_samples())
def test_any_tube_against_the_slow_version(case):
    tube, sample = case
    for name, protocol in PROTOCOLS.items():
        scores = protocol(tube, sample)
        exact = {f: tuple(map(Fraction, box)) for f, box in tube[1].items()}
        expected = slow_scores(name, set(range(*tube[0])), exact, sample)
        assert (scores["tIoU"], scores["vIoU"]) == pytest.approx(expected, abs=1e-12), name
        assert 0 <= scores["vIoU"] <= 1 and 0 <= scores["tIoU"] <= 1 and scores["failures"] == 0


def ceiling_samples():
    """Clips with boxes on the text's grid: one in steady motion, one that jumps and has a hole, ..."""
    moving = {f: (f / 100, 0.25, f / 100 + 0.5, 0.75) for f in range(7, 33)}
    jumps = {f: f * 37 % 50 / 100 for f in range(12, 40) if f != 20}
    jumping = {f: (x, 0.0, 0.5 + x, 1.0) for f, x in jumps.items()}
    return [
        make_sample(7, 33, num_frames=40, boxes=moving),
        make_sample(12, 40, num_frames=40, boxes=jumping, question_type="declarative"),
        make_sample(23, 26, num_frames=40, question_type="interrogative"),  # within step 2
        make_sample(10, 30, num_frames=40, begin_frame=37, file_frames=300, question_type="declarative"),
        make_sample(5, 25, num_frames=60, fps=29.97),
    ]


def slow_truths(sample, step):
    """Span -> the answer with its true boxes, for all spans in whole steps; boxes by their definition."""
    fps, frames = Fraction(sample.fps), range(sample.num_frames)
    count = len([i for i in frames if i * step < sample.num_frames / fps])
    shown = [max(f for f in frames if f / fps <= i * step) for i in range(count)]
    answers = {}
    for span in [(a, b) for a in range(count) for b in range(a, count)]:
        steps = range(span[0], span[1] + 1)
        # Outside the truth and in its holes: of the nearest step with a box, else of the nearest frame.
        boxes = {i: sample.boxes.get(max(shown[i], sample.first_frame)) for i in steps}
        boxes = {i: box for i, box in boxes.items() if box}
        if not boxes:
            _, nearest = min((abs(f - max(shown[span[0]], sample.first_frame)), f) for f in sample.boxes)
            boxes = {span[0]: sample.boxes[nearest]}
        items = {i: boxes[min(boxes, key=lambda k, i=i: (abs(k - i), k))] for i in steps}
        items = {i: tuple(round(1000 * v) for v in box) for i, box in items.items()}
        answers[span] = make_answer(*span, items)
    return answers


@pytest.mark.parametrize("time_unit", TIME_UNITS)
def test_whole_steps_by_brute_force(time_unit):
    """best: the maximum over all spans. taught: the score of the span whose edges are nearest."""
    text_format, rng, samples = TextFormat(time_unit=time_unit), random.Random(0), ceiling_samples()
    # The first frames of the last step are not in the truth, which ends with the clip; a step of no frame.
    samples.append(make_sample(28, 37, num_frames=37, fps=29.97, question_type="declarative"))
    samples.append(make_sample(49, 60, num_frames=60, fps=59.94))
    for _ in range(12):  # spans anywhere
        num_frames, fps = rng.choice([(40, 20), (60, 25), (37, 23.75)])
        first = rng.randrange(num_frames)
        samples.append(make_sample(first, rng.randint(first + 1, num_frames), num_frames=num_frames, fps=fps))
    for sample in samples:
        step = Fraction(text_format.step_seconds)
        result = whole_step_scores([sample], text_format)
        scores = {
            span: {name: slow_scores(name, *slow_tube(a, sample, step, NORM), sample) for name in PROTOCOLS}
            for span, a in slow_truths(sample, step).items()
        }
        taught = sample.grid(float(step)).steps_of(sample.first_frame, sample.stop_frame)
        for name in PROTOCOLS:
            for k, key in enumerate(("m_tIoU", "m_vIoU")):
                most = max(score[name][k] for score in scores.values())
                assert result["best"][name][key] == pytest.approx(100 * most), (name, key)
                assert result["taught"][name][key] == pytest.approx(100 * scores[taught][name][k])


def test_the_best_under_stcat_may_end_a_frame_earlier():
    """Where a step is one frame: 19 of HC-STVG's 20 frames are all that the protocol wants."""
    result = whole_step_scores([make_sample(20, 40)], TextFormat(fps=20.0))
    assert [result[name]["stcat"]["m_tIoU"] for name in ("best", "taught")] == [100, 95]


@given(st.lists(st.tuples(*[st.integers(0, 8)] * 8), min_size=1))
def test_rows_of_ious_are_those_of_the_rewards(rows):
    """To the last bit, also of boxes without an inside."""
    a, b = np.split(np.array(rows) / 7, 2, axis=1)
    expected = [iou(tuple(p), tuple(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    assert ious(a, b).tolist() == expected


def test_viou_by_area_by_hand():
    """Areas: 0.005 and 0.012, mean 0.0085; 1/128 and 0.0121875, mean 0.01, an edge; 0.25 twice, too; 1."""
    assert AREA_EDGES == (0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81, 1)  # Fig. 4
    boxes = [
        {0: (0.5, 0.5, 0.55, 0.6), 1: (0.5, 0.5, 0.6, 0.62)},
        {0: (0.0, 0.5, 0.125, 0.5625), 1: (0.0, 0.5, 0.195, 0.5625)},
        {0: (0.0, 0.0, 0.5, 0.5)},
        {0: (0.25, 0.0, 0.5, 1.0)},
        {0: (0.0, 0.0, 1.0, 1.0)},
    ]
    samples = [make_sample(0, len(b), boxes=b) for b in boxes]
    scores = {
        name: [{"tIoU": 1.0, "vIoU": viou, "failures": 0} for viou in vious]
        for name, vious in (("think", (0.25, 0.5, 0.5, 0.0, 1.0)), ("pred", (0.5, 0.25, 0.75, 0.75, 0.125)))
    }
    rows = viou_by_area(samples, scores)
    assert [(row["low"], row["high"]) for row in rows] == list(pairwise(AREA_EDGES))
    assert [row["N"] for row in rows] == [1, 1, 0, 0, 0, 2, 0, 0, 0, 1]
    assert [row["think"] for row in rows if row["N"]] == [25, 50, 25, 100]
    assert [row["pred"] for row in rows if row["N"]] == [50, 25, 75, 12.5]
    assert {row["pred"] for row in rows if not row["N"]} == {None}
