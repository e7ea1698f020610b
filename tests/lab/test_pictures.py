"""visualize.py: pixels of the pictures and numbers of the curves, from run folders made by hand."""

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from browser import look, open_browser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from test_page import HOSTILE, Tables

from config import Config, Sft, save_config
from data import load_samples
from lab import pictures, report, sheet
from lab.page import COLOURS, LIGHT
from lab.pictures import curve, draw_curves, draw_run, label, panels_of, runs_of, trailing
from lab.sheet import Answered, draw_strip, fit, overlay
from prompts import Answer, format_answer, parse_answer, truth_answer
from rewards import TERMS, score
from runtime.files import DataError, read_jsonl
from runtime.logs import PARTS
from samples import Truth

ROOT = Path(__file__).parent.parent.parent
GREEN, BLUE, RED = (COLOURS[name] for name in ("truth", "think", "pred"))
GREY = 255 - round((255 - 100) * LIGHT)  # what becomes of a pixel of 100


def grey_frames(count, size=56):
    return np.full((count, size, size, 3), 100, np.uint8)


# ----------------------------------------------------------------------------------------------------------
# A run folder as train.py writes it, of grey videos


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(folder, videos=10, seconds=6, metrics=None):
    """Answers get better with the number of their video: off by 300, 270, ... thousandths of the frame."""
    annotations = {}
    (folder / "videos").mkdir()
    frame = b"FRAME\n" + bytes([100]) * 56 * 56 + bytes([128]) * (56 * 56 // 2)
    for k in range(videos):
        header = b"YUV4MPEG2 W56 H56 F2:1 Ip A1:1 C420jpeg\n"
        (folder / "videos" / f"{k}.y4m").write_bytes(header + frame * 2 * seconds)
        annotations[f"{k}.y4m"] = {
            "caption": "the $quare moves_left from $here",
            "width": 56,
            "height": 56,
            "img_num": 2 * seconds,
            "fps": 2,
            "st_frame": 5,  # steps 2 and 3 of a second
            "bbox": [[14, 14, 14, 28]] * 4,
        }
    (folder / "eval.json").write_text(json.dumps(annotations))
    run = folder / "run"
    run.mkdir()
    annotated = str(folder / "eval.json")
    places = {"train_annotations": annotated, "eval_annotations": annotated, "videos": str(folder / "videos")}
    save_config(Config(**places, time_unit="second", steps=12), run / "config.yaml")
    for name, scale in (("predictions_before", 1.5), ("predictions", 1)):
        records = []
        for k in range(videos):
            shift = round(scale * (300 - 30 * k))
            items = tuple((step, (250 + shift, 250, 500 + shift, 750)) for step in (2, 3))
            text = format_answer(Answer(2, 3, items, items)) if k or scale == 1 else "<time> 2"
            records.append({"id": f"{k}.y4m", "completion": text, "scale": [1000, 1000]})
        write_jsonl(run / f"{name}.jsonl", records)
    write_jsonl(run / "metrics.jsonl", METRICS[:1] if metrics is None else metrics)  # few are drawn sooner
    write_jsonl(run / "rollouts.jsonl", sampled(videos))
    return run


# Prompt -> steps at which it is sampled. Number 4 comes once and after the others.
SAMPLED = {0: (1, 5, 9), 1: (2, 3, 6, 7, 11, 12), 2: (4,), 3: (8,), 4: (10,)}


def sampled(videos):
    """Lines of rollouts.jsonl: of each prompt and step four answers, one of them malformed. Boxes go right by
    a tenth with each answer, truth is 250 .. 500, and so is the thinking box."""
    lines = []
    for step, k in sorted((step, k) for k, steps in SAMPLED.items() if k < videos for step in steps):
        truth = Truth((2, 3), dict.fromkeys((2, 3), (0.25, 0.25, 0.5, 0.75)))
        for generation in range(4):
            think, pred = ([(i, (250 + d, 250, 500 + d, 750)) for i in (2, 3)] for d in (0, 100 * generation))
            text = format_answer(Answer(2, 3, tuple(think), tuple(pred))) if generation < 3 else "no idea"
            rewards = score(text, truth).rewards
            record = {"step": step, "id": f"{k}.y4m", "generation": generation, "completion": text}
            record |= {"truth": {"span": truth.span, "boxes": truth.boxes}, "scale": [1000, 1000]}
            record |= {"rewards": rewards, "advantage": 1.5 - generation}
            lines.append(record)
    return lines


def evaluated(*scores):
    names = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "N", "failures")
    return dict(zip(names, (*scores, 10, 1), strict=True))


METRICS = [
    {"phase": "eval", "step": 0, **evaluated(80.0, 30.0, 40.0, 10.0)},
    {"phase": "sft", "step": 1, "loss": 0.7},
    *[
        {
            "phase": "grpo",
            "step": step,
            "reward": 2.0 + step / 8,
            "reward_std": 1 / step,
            "kl": step / 64,
            "loss": 0.0,
            **dict.fromkeys(TERMS, step / 16),
            **dict.fromkeys(("tiou", "viou_think", "viou_pred"), 0.5),
            **dict.fromkeys(("overlap", "copied", "zero_spread", "truncated", "one_step"), 0.25),
            **dict.fromkeys(("invalid_boxes", "out_of_frame", "span_ratio", "think_gap", "length"), 0.75),
            "std": dict.fromkeys((*TERMS, "my/own.py:$mine_"), 0.5),
            "my/own.py:$mine_": -1.0,
            "seconds": {**dict.fromkeys(PARTS, 0.5), "step": 3.25},
            "drift": float(step in (5, 6, 7, 11)),
        }
        for step in range(1, 13)
    ],
    {"phase": "eval", "step": 12, **evaluated(90.0, 50.0, 80.0, 60.0)},
]


# ----------------------------------------------------------------------------------------------------------
# Boxes on frames


def test_outlines_are_nested_around_a_box_they_share():
    box = (0.25, 0.25, 0.5, 0.75)  # 56 px x 3: rows 42..125, columns 42..83
    image = overlay(grey_frames(1)[0], dict.fromkeys(COLOURS, box), 168)
    assert image.shape == (168, 168, 3)
    middle = [tuple(pixel) for pixel in image[84, 39:49].tolist()]
    assert middle == [(GREY,) * 3, GREEN, GREEN, BLUE, BLUE, RED, RED, *[(GREY,) * 3] * 3]
    across = [tuple(pixel) for pixel in image[119:129, 60].tolist()]  # downwards, out of the box
    assert across == [(GREY,) * 3, (GREY,) * 3, (GREY,) * 3, RED, RED, BLUE, BLUE, GREEN, GREEN, (GREY,) * 3]
    assert (image == GREEN).all(2).sum() == 88 * 46 - 84 * 42  # one closed line, 2 wide
    assert (image == BLUE).all(2).sum() == 84 * 42 - 80 * 38
    assert (image == RED).all(2).sum() == 80 * 38 - 76 * 34


def test_outlines_stand_where_their_boxes_do():
    boxes = {"truth": (0.1, 0.1, 0.3, 0.4), "think": (0.5, 0.0, 1.0, 0.5), "pred": (0.2, 0.6, 0.7, 0.9)}
    image = overlay(grey_frames(1, 100)[0], boxes, 100)
    for name, (outwards, corners) in {
        "truth": (2, (10, 10, 30, 40)),
        "think": (0, (50, 0, 100, 50)),
        "pred": (-2, (20, 60, 70, 90)),
    }.items():
        ys, xs = np.nonzero((image == COLOURS[name]).all(2))
        left, top, right, bottom = corners
        assert (xs.min(), ys.min()) == (left - outwards, top - outwards)
        assert (xs.max() + 1, ys.max() + 1) == (right + outwards, bottom + outwards)


def test_a_box_without_an_inside_is_not_drawn_and_a_tiny_one_is():
    frame = grey_frames(1)[0]
    flipped = overlay(frame, {"pred": (0.5, 0.5, 0.2, 0.8)}, 168)
    assert (flipped == GREY).all()
    for box in ((0.5, 0.5, 0.505, 0.505), (0.999, 0.999, 1.0, 1.0), (0.0, 0.0, 0.001, 1.0)):
        assert (overlay(frame, {"pred": box}, 168) == RED).all(2).any()


def test_small_frames_are_enlarged_pixel_by_pixel_and_large_ones_reduced():
    frame = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    assert (fit(frame, 168)[1::3, 1::3] == frame).all() and fit(frame, 168).shape == (120, 168, 3)
    assert fit(np.zeros((360, 640, 3), np.uint8), 160).shape == (90, 160, 3)


def test_bars_mark_the_spans_beneath_the_frames():
    truth = Truth((1, 2), {1: (0.2, 0.2, 0.8, 0.8), 2: (0.2, 0.2, 0.8, 0.8)})
    items = tuple((step, (200, 200, 800, 800)) for step in (2, 3))
    scored = score(format_answer(Answer(2, 3, items, items)), truth)
    answered = Answered("AFTER", "", scored.answer, (1000, 1000), scored.rewards, {})
    strip = draw_strip(grey_frames(5), list(range(5)), truth, answered, 56)
    tiles = [strip[:, k * (56 + sheet.GAP) :][:, :56] for k in range(5)]
    under = [tile[56:, 28].tolist() for tile in tiles]
    assert [list(GREEN) in column for column in under] == [False, True, True, False, False]
    assert [list(RED) in column for column in under] == [False, False, True, True, False]
    boxed = [{name for name, c in COLOURS.items() if (tile[:56] == c).all(2).any()} for tile in tiles]
    assert boxed == [set(), {"truth"}, {"truth", "think", "pred"}, {"think", "pred"}, set()]


# ----------------------------------------------------------------------------------------------------------
# Curves


def axes_of(metrics, think=True):
    """title -> axes of the sheet of curves."""
    return {axes.get_title(): axes for axes in draw_curves(panels_of(metrics, think), "run").axes}


def names_of(axes):
    """What the legend says."""
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def curves_of(axes):
    """name -> its line, as the legend has them."""
    return dict(zip(names_of(axes), axes.get_lines(), strict=True))


def test_curves_are_the_numbers_of_the_log():
    assert curve(METRICS, "sft", "loss") == ([1], [0.7])  # not the loss of the other phase
    assert curve(METRICS, "eval", "m_vIoU") == ([0, 12], [30.0, 50.0])
    assert curve(METRICS, "grpo", "1 - overlap") == (list(range(1, 13)), [0.75] * 12)
    panels = axes_of(METRICS)
    (line,) = panels["Reward of sampled answers"].get_lines()
    assert line.get_xdata().tolist() == list(range(1, 13))
    rewards = [2.0 + step / 8 for step in range(1, 13)]
    assert line.get_ydata()[-1] == pytest.approx(np.mean(rewards[-10:]))  # the last 10 of 12
    assert line.get_ydata()[1] == pytest.approx(np.mean(rewards[:2]))
    band = panels["Reward of sampled answers"].collections[0].get_paths()[0].vertices
    last = band[band[:, 0] == 12, 1]
    assert (last.min(), last.max()) == pytest.approx(
        (line.get_ydata()[-1] - np.std(rewards[-10:]), line.get_ydata()[-1] + np.std(rewards[-10:]))
    )
    scores = curves_of(panels["Held-out split, greedy answers (%)"])
    assert {name: line.get_ydata().tolist() for name, line in scores.items()} == {
        "m_tIoU": [80.0, 90.0],
        "m_vIoU": [30.0, 50.0],
        "vIoU@0.3": [40.0, 80.0],
        "vIoU@0.5": [10.0, 60.0],
    }
    assert len(panels) == 12


def test_terms_of_ones_own_show_with_their_spread():
    panels = axes_of(METRICS)
    terms = curves_of(panels["Reward terms, unweighted"])
    assert set(terms) == {*TERMS, "own.py:$mine_"}
    assert set(terms["own.py:$mine_"].get_ydata()) == {-1.0}
    spread = curves_of(panels["Spread within a group: reward and terms"])
    assert set(spread) == {"reward_std", *terms} and set(spread["own.py:$mine_"].get_ydata()) == {0.5}
    colours = [line.get_color() for line in terms.values()]
    assert len(set(colours)) == len(colours)


def test_steps_where_reward_and_viou_part_are_shaded():
    assert runs_of([5, 6, 7, 11]) == [(5, 7), (11, 11)] and runs_of([]) == []
    (axes,) = [axes for title, axes in axes_of(METRICS).items() if title.startswith("Reward of")]
    shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert shaded == [(4.5, 7.5), (10.5, 11.5)]


def test_seconds_lie_upon_one_another():
    axes = axes_of(METRICS)["Seconds of a step"]
    tops = [layer.get_paths()[0].vertices[:, 1].max() for layer in axes.collections]
    assert tops == [0.5 * (k + 1) for k in range(len(PARTS))]


def test_a_long_run_has_thinner_curves():
    long = [{"phase": "grpo", "step": step, "reward": step % 7} for step in range(1, 1802)]
    (axes,) = axes_of(long).values()
    (line,) = axes.get_lines()
    steps, values = line.get_xdata(), line.get_ydata()
    assert len(steps) == 451 and steps[-1] == 1801 and set(np.diff(steps)) == {4}
    assert values[-1] == pytest.approx(np.mean([step % 7 for step in range(1792, 1802)]))


def test_a_panel_without_numbers_is_left_out():
    assert list(axes_of([{"phase": "grpo", "step": 1, "reward": 1.0}])) == ["Reward of sampled answers"]
    assert draw_curves([], "run").axes == []


def test_a_run_without_thinking_boxes_has_no_curves_of_them():
    panels = axes_of(METRICS, think=False)
    assert "Spatial reward, pred boxes - think boxes" not in panels and len(panels) == 11
    names = {name for axes in panels.values() for name in names_of(axes)}
    assert not any("think" in name or name == "copied" for name in names) and "viou_pred" in names


def test_trailing_mean_and_spread_by_hand():
    mean, spread = trailing([4.0, 2.0, 6.0, 1.0], 3)
    assert mean.tolist() == [4.0, 3.0, 4.0, 3.0]
    assert spread**2 == pytest.approx([0.0, 1.0, 8 / 3, 14 / 3])


# ----------------------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with all its pictures, and their paths. To be read only."""
    run = make_run(tmp_path_factory.mktemp("drawn"), metrics=METRICS)
    (run / "summary.json").write_text("{}")  # it has ended
    return run, draw_run(run)


def test_pictures_of_a_run(drawn):
    run, paths = drawn
    names = ["run.html", "curves.png", "area.png", "answers.png"]
    assert paths == [run / "pictures" / name for name in names]
    curves, areas, answers = ((imread(path)[:, :, :3] * 255).round().astype(np.uint8) for path in paths[1:])
    for colour in (BLUE, RED):
        assert (areas == colour).all(2).any()
    for colour in (pictures.RED, pictures.ORANGE, pictures.TEAL):
        assert (curves == [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).all(2).any()
    green, blue, red = ((answers == colour).all(2).sum() for colour in COLOURS.values())
    # 8 sentences before and after; one truth box of 42 x 84 px in 2 steps of each, drawn at full length
    # where nothing crosses it, one answer of the 16 malformed. Bars and the legend add to it.
    assert green > 16 * 2 * 2 * 168 and blue > 15 * 2 * 150 and red > 15 * 2 * 2 * 168


def test_the_sheet_shows_the_worst_and_the_best(tmp_path):
    run = make_run(tmp_path)
    words = [text.get_text() for text in sheet.draw_answers(run).texts]
    rows = [text.split("\n") for text in words if text.startswith(("BEFORE", "AFTER"))]
    assert [row[0] for row in rows] == ["BEFORE", "AFTER"] * 8
    assert rows[0] == ["BEFORE", "reward 0.00", "malformed"]
    rewards = [float(row[1].removeprefix("reward ")) for row in rows if row[0] == "AFTER"]
    assert rewards == sorted(rewards)
    # By hand, shift d of the width: format + consistency + temporal + 2 (GIoU - 2 d). d = 0.3 is beyond the
    # box of width 0.25: IoU 0, hull 0.55, union 0.5. d = 0.03: IoU 0.22 / 0.28 = GIoU.
    assert rewards[0] == pytest.approx(3 + 2 * (-0.05 / 0.55 - 0.6), abs=0.006)
    assert rewards[-1] == pytest.approx(3 + 2 * (0.22 / 0.28 - 0.06), abs=0.006)
    assert rows[-1][2:] == ["tIoU 1.00", f"vIoU {0.22 / 0.28:.2f}"]
    assert words.count("the $quare moves_left from $here") == 8
    assert [word for word in words if word.isdigit()] == ["1", "2", "3", "4", "5"] * 8


def test_the_sheet_of_an_evaluation_along_the_way(tmp_path):
    run = make_run(tmp_path, videos=2)
    (run / "predictions.jsonl").rename(run / "predictions_5.jsonl")
    for name, step, expected in (
        ("predictions_5.jsonl", "STEP 5", ["BEFORE", "STEP 5"] * 2),
        ("predictions_before.jsonl", "STEP 0", ["STEP 0"] * 2),
    ):
        words = [text.get_text() for text in sheet.draw_answers(run, name, step).texts]
        assert [word.split("\n")[0] for word in words if "\n" in word] == expected


def test_texts_of_the_sheet_do_not_overlap(tmp_path):
    run = make_run(tmp_path)
    figure = sheet.draw_answers(run)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in [*figure.texts, *figure.legends[0].get_texts()]]
    assert len(boxes) > 70
    for k, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:k])


def test_long_clips_show_twelve_steps(tmp_path):
    run = make_run(tmp_path, videos=1, seconds=30)
    words = [text.get_text() for text in sheet.draw_answers(run).texts]
    steps = [int(word) for word in words if word.isdigit()]
    assert len(steps) == 11 and steps[-1] == 29  # "step 0" is the twelfth


def test_a_run_in_training_has_its_curves(tmp_path):
    run = make_run(tmp_path)
    (run / "predictions.jsonl").unlink()
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 12, "id": "4')
    assert [path.name for path in draw_run(run)] == ["run.html", "curves.png", "area.png"]
    (run / "predictions_before.jsonl").unlink()
    (run / "rollouts.jsonl").unlink()
    write_jsonl(run / "metrics.jsonl", [])
    assert [path.name for path in draw_run(run)] == ["run.html", "curves.png"]


def test_a_perfect_answer_is_last(tmp_path):
    run = make_run(tmp_path, videos=3)
    samples, _ = load_samples("hcstvg", str(tmp_path / "eval.json"), str(tmp_path / "videos"))
    perfect = format_answer(truth_answer(samples[0].truth(1.0), (1000, 1000)))
    records = read_jsonl(run / "predictions.jsonl", "completion")
    records[0]["completion"] = perfect
    write_jsonl(run / "predictions.jsonl", records)
    words = [text.get_text() for text in sheet.draw_answers(run).texts]
    assert [w for w in words if w.startswith("AFTER")][-1] == "AFTER\nreward 5.00\ntIoU 1.00\nvIoU 1.00"


# ----------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


def page_of(run):
    return draw_run(run)[0].read_text(encoding="utf-8")


def test_numbers_on_the_page_are_those_of_the_files(drawn):
    text = drawn[1][0].read_text(encoding="utf-8")
    scores, settings, gains, *groups, before, after = Tables(text).tables
    assert scores[1:] == [
        ["before", "80.0", "30.0", "40.0", "10.0", "10", "1"],
        ["after", "90.0", "50.0", "80.0", "60.0", "10", "1"],
    ]
    # Rewards 2 + step / 8: the first tenth of 12 steps, and the last.
    assert "Mean reward, first and last 1 of 12 steps: 2.12 → 3.50." in text
    assert "12 of 12 steps, finished." in text
    assert ["time_unit", "second", "frame"] in settings and ["steps", "12", "1000"] in settings
    assert [row[0] for row in settings].count("seed") == 0

    # The answers' two lists are the same, so nothing is gained; one of those before is malformed.
    assert [row[3:] for row in gains[1:]] == [
        ["0.00", "0.00", "0.00", "0.00", "100.00", "9"],
        ["0.00", "0.00", "0.00", "0.00", "100.00", "10"],
    ]
    for table, count in ((before, 10), (after, 10)):
        assert table[0] == ["id", "sentence", "reward", "tIoU", "vIoU"] and len(table) == 1 + count
    # Video 9 is off by d = 0.03 of the width, and before by 0.045: its IoU is (0.25 - d) / (0.25 + d).
    assert after[-1][2:] == [f"{3 + 2 * (22 / 28 - 0.06):.2f}", "1.00", f"{22 / 28:.2f}"]
    assert before[-1][4] == f"{(250 - 45) / (250 + 45):.2f}" and before[1][2:] == ["0.00"] * 3

    # Prompt 1 comes at six steps, of which four are shown; 0 at three; 2 once, and before 3 and 4.
    assert [sorted({int(row[0]) for row in table[1:]}) for table in groups] == [[2, 6, 7, 12], [1, 5, 9], [4]]
    rewards = [row[1:3] for row in groups[-1][1:]]
    # Off by d = 0, 0.1, 0.2: thinking boxes earn 1, final ones (0.25 - d) / (0.25 + d) - 2 d.
    expected = [5.0, 4 + 0.15 / 0.35 - 0.2, 4 + 0.05 / 0.45 - 0.4, 0.0]
    assert rewards == [[f"{r:.2f}", f"{1.5 - k:.2f}"] for k, r in enumerate(expected)]
    assert groups[-1][0][3:] == list(TERMS)


def test_figures_of_the_page(drawn):
    text = drawn[1][0].read_text(encoding="utf-8")
    assert text.count('<svg class="figure"') == len(panels_of(METRICS)) + 1
    assert [panel.title in text for panel in panels_of(METRICS)] == [True] * 12
    # Sampled: 4 answers at 4 + 3 + 1 steps. Held out: 10 sentences, before and after, at each of the two.
    assert text.count('<svg class="tubes"') == 4 * 8 + 2 * 2 * 10
    assert text.count("<symbol") == 10  # prompts are sentences of the same videos here
    assert not re.search(r"https?:|\ssrc=|@import", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_evaluations_along_the_way(tmp_path):
    run = make_run(tmp_path, videos=2)
    for step in (2, 10, 4, 6, 8):
        (run / f"predictions_{step}.jsonl").write_bytes((run / "predictions.jsonl").read_bytes())
    for other in ("predictions_blank", "predictions_of_checkpoint_4", "predictions.2"):
        (run / f"{other}.jsonl").write_text("not for the page")
    found = [name for name, _ in report.find_evaluations(run)]
    assert found == [
        "BEFORE",
        "STEP 4",
        "STEP 6",
        "STEP 8",
        "AFTER",
    ]  # 5 of the 7, evenly, ordered as numbers
    text = page_of(run)
    heads = re.findall(r'<details name="evaluation" class="part"( open)?><summary>([^<]*)', text)
    assert heads == [*[("", name) for name in found[:-1]], (" open", "AFTER")]
    opened = text[text.index(" open><summary>AFTER") :]
    names = re.compile(r"<p>([A-Z]+(?: \d+)?): reward")
    assert names.findall(opened) == ["BEFORE", "AFTER"] * 2
    halfway = text[text.index("<summary>STEP 6") : text.index("<summary>STEP 8")]
    assert names.findall(halfway) == ["BEFORE", "STEP 6", "AFTER"] * 2


def test_an_id_may_stand_in_both_splits_and_sentences_may_share_a_clip(tmp_path):
    config = pictures.load_config(make_run(tmp_path, videos=2, seconds=30) / "config.yaml")
    first, second = sheet.held_out(config).values()
    other, again = dataclasses.replace(second, id=first.id), dataclasses.replace(first, sentence="it goes")
    clips, strips, faults = report.read_clips([first, other, again], config)
    assert len(clips) == len(strips) == 2 and faults == []
    assert report.name_of(first) == report.name_of(again) != report.name_of(other)
    clip = clips[report.name_of(first)]
    assert (clip.steps[0], clip.steps[-1], len(clip.steps), clip.aspect) == (0, 29, 12, 1)
    assert clip.width == 12 * 60 + 4


def test_worst_median_and_best():
    ranked = [str(k) for k in range(20)]
    assert report.extremes(ranked) == {"Worst": ranked[:4], "Median": ranked[8:12], "Best": ranked[16:]}
    assert report.extremes(ranked[:6]) == {"Worst": ranked[:4], "Median": ranked[4:6]}
    for count in range(1, 15):
        keys = [key for part in report.extremes(ranked[:count]).values() for key in part]
        assert sorted(keys, key=int) == ranked[: min(count, 12)] or len(set(keys)) == len(keys) == 12


def test_hostile_text_is_only_text(tmp_path, driver):
    run = make_run(tmp_path, videos=2)
    path = tmp_path / "eval.json"
    annotations = json.loads(path.read_text())
    annotations["1.y4m"]["caption"] = HOSTILE.replace("\x00", "")  # which has no glyph for the sheet
    path.write_text(json.dumps(annotations))
    write_jsonl(run / "predictions.jsonl", [{"id": "1.y4m", "completion": HOSTILE}])
    text = page_of(run)
    assert "<img" not in text and text.count("<script>") == 1
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3  # sentence and answer
    assert look(driver, run / "pictures" / "run.html", 390) == []
    assert driver.title == "run: a run of STVG-o1"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(drawn, driver, width):
    assert look(driver, drawn[1][0], width) == []
    counts = driver.execute_script(
        "return ['svg.figure', 'svg.tubes', 'table'].map(name => document.querySelectorAll(name).length)"
    )
    assert counts == [13, 4 * 8 + 2 * 2 * 10, 3 + 3 + 2]


def test_a_run_without_thinking_boxes(tmp_path):
    run = make_run(tmp_path, videos=3)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("think: true", "think: false"))
    for name in ("predictions_before", "predictions", "rollouts"):
        lines = read_jsonl(run / f"{name}.jsonl")
        for line in lines:
            line["completion"] = re.sub(r"<think_bbox>.*</think_bbox> ", "", line["completion"])
            assert line["completion"] in ("no idea", "<time> 2") or parse_answer(line["completion"], False)
        write_jsonl(run / f"{name}.jsonl", lines)
    text = page_of(run)
    assert text.count('<rect class="box think"') == 0 < text.count('<rect class="box pred"')
    assert "gain over the thinking boxes" not in text and ">pred boxes</text>" in text
    assert ">think boxes</text>" not in text


def strips_of(text):
    """The picture of each strip on a page, uint8 (h, w, 3), and the number of times it is shown."""
    strips = {}
    for name, data in re.findall(r'<symbol id="([^"]*)".*?base64,([^"]*)"', text):
        image = imread(io.BytesIO(base64.b64decode(data)), format="png")[:, :, :3]
        strips[name] = (image * 255).round().astype(np.uint8), text.count(f'<use href="#{name}"')
    return list(strips.values())


@pytest.mark.parametrize("choice", ["error", "skip"])
def test_a_video_that_cannot_be_read_leaves_grey_frames(tmp_path, choice, capsys):
    run = make_run(tmp_path, videos=3)
    (tmp_path / "videos" / "0.y4m").write_bytes(b"no video")
    records = read_jsonl(run / "predictions.jsonl")
    records[0] = {"id": "0.y4m", "completion": "", "unreadable": True}
    write_jsonl(run / "predictions.jsonl", records)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("on_bad_video: error", f"on_bad_video: {choice}"))
    text = page_of(run)
    said = "1 of the 3 clips shown cannot be read, and their frames are grey; the first: "
    said += f"{tmp_path}/videos/0.y4m: 8 bytes that cannot be opened as a video (incomplete, or of an unknown"
    said += " codec); fetch or re-encode the file, or remove its annotation"
    assert f"<p>{said}</p>" in text and capsys.readouterr().err == said + "\n"
    assert [((image == sheet.GREY).all(), shown) for image, shown in strips_of(text)] == [
        (False, 4 * 4 + 2 * 2),  # sampled at 4 steps; answered before and after, on the page of each
        (True, 3 * 4 + 1),  # sampled at 3 steps; answered before
        (False, 4 + 2 * 2),
    ]
    assert "All 2 answers as numbers" in text and "All 3 answers as numbers" in text


def test_a_run_without_its_videos(tmp_path, capsys):
    """As one that was copied from another machine: all that can be drawn is drawn."""
    run = make_run(tmp_path, videos=4)
    before = [imread(path) for path in draw_run(run)[1:]]
    assert capsys.readouterr().err == ""
    (tmp_path / "videos").rename(tmp_path / "elsewhere")
    pictures.main([str(run)])
    out, err = capsys.readouterr()
    paths = [run / "pictures" / name for name in ("run.html", "curves.png", "area.png", "answers.png")]
    assert out == "".join(f"{path}\n" for path in paths)
    said = "4 of the 4 clips shown cannot be read, and their frames are grey; the first: "
    said += f"{tmp_path}/videos/1.y4m: no such video file; check the folder given as `videos`"
    text = paths[0].read_text(encoding="utf-8")
    assert err == said + "\n" and f"<p>{said}</p>" in text
    assert [(image == sheet.GREY).all() for image, _ in strips_of(text)] == [True] * 4
    curves, areas, answers = map(imread, paths[1:])
    assert (curves == before[0]).all() and (areas == before[1]).all()
    # The same sheet but for the frames, and the words before each sentence.
    assert answers.shape == before[2].shape
    colours = [(np.round(answers[:, :, :3] * 255) == colour).all(2) for colour in (GREEN, BLUE, RED)]
    assert [mask.sum() for mask in colours] == [
        (np.round(before[2][:, :, :3] * 255) == colour).all(2).sum() for colour in (GREEN, BLUE, RED)
    ]
    words = [text.get_text() for text in sheet.draw_answers(run).texts]
    assert words.count("[no video] the $quare moves_left from $here") == 4


@pytest.mark.parametrize(("size", "shape"), [((1920, 1080), (94, 168)), ((2, 9000), (168, 1))])
def test_grey_frames_have_the_shape_of_the_video(tmp_path, size, shape):
    sample = sheet.held_out(pictures.load_config(make_run(tmp_path, videos=1) / "config.yaml"))["0.y4m"]
    width, height = size
    gone = dataclasses.replace(sample, video="gone.mp4", width=width, height=height)
    steps, frames, fault = sheet.shown_frames(gone, 1.0)
    assert steps == [0, 1, 2, 3, 4, 5] and frames.shape == (6, *shape, 3) and fault.startswith("gone.mp4: ")


def test_a_sampled_answer_stands_beside_the_truth_it_was_judged_by(tmp_path):
    """Of the true steps 2 and 3 the video showed the first only, which is what the record says."""
    run = make_run(tmp_path, videos=1)
    lines = [line for line in sampled(1) if line["step"] == 5]
    cut = {"span": [2, 2], "boxes": {"2": [0.25, 0.25, 0.5, 0.75]}}
    write_jsonl(run / "rollouts.jsonl", [line | {"truth": cut} for line in lines])
    text = page_of(run)
    trained, held_out = text.split("<h2>Held-out answers</h2>")
    spans = re.compile(r'aria-label="truth steps (\d) to (\d)')
    assert spans.findall(trained) == [("2", "2")] * 4 and set(spans.findall(held_out)) == {("2", "3")}
    assert trained.count('<rect class="box truth"') == 4
    write_jsonl(run / "rollouts.jsonl", [line | {"truth": cut | {"span": [2]}} for line in lines])
    said = r"rollouts\.jsonl: '0\.y4m' at step 5: truth span \[2\]: write \[first, last\]"
    with pytest.raises(DataError, match=said):
        draw_run(run)


def test_steps_that_are_done():
    def said(sft, steps, metrics, finished):
        planned = Config(model="m", train_annotations="a", steps=steps, sft=Sft(sft))
        first = report.head(planned, metrics, finished)[0]
        return re.match(r"<p>m on a: (.*?)\.( Mean reward.*)?</p>", first)[1]

    assert said(1, 0, METRICS[1:2], True) == "1 of 1 supervised steps, finished"
    begun = "1 of 4 supervised steps, 0 of 12 steps, under way or stopped"
    assert said(4, 12, METRICS[1:2], False) == begun
    assert said(1, 12, METRICS[:5], False) == "1 of 1 supervised steps, 3 of 12 steps, under way or stopped"
    assert said(0, 12, METRICS, True) == "12 of 12 steps, finished"
    assert said(0, 0, METRICS[:1], True) == "finished"


# ----------------------------------------------------------------------------------------------------------
# Rewards of the time when the answers were given


def with_own_reward(tmp_path):
    """A run whose reward is the built-in ones and a tenth of what a file says, which is 7; the file; what the
    run's answers have earned, by id."""
    run, own = make_run(tmp_path, videos=2), tmp_path / "own.py"
    own.write_text("def seven(answer, truth):\n    return 7\n")
    name = f"{own}:seven"
    config = pictures.load_config(run / "config.yaml", [f"rewards.{name}=0.1"])
    save_config(config, run / "config.yaml")
    records, totals = read_jsonl(run / "predictions.jsonl"), {}
    for record, sample in zip(records, sheet.held_out(config).values(), strict=True):
        rewards = score(record["completion"], sample.truth(1.0)).rewards
        totals[record["id"]] = rewards["total"] + 0.7
        record["rewards"] = rewards | {name: 7.0, "total": rewards["total"] + 0.7}
    write_jsonl(run / "predictions.jsonl", records)
    (run / "predictions_before.jsonl").unlink()
    return run, own, totals


def rewards_on(text):
    """id -> reward, of the table with all answers of the last evaluation."""
    return {row[0]: row[2] for row in Tables(text).tables[-1][1:]}


@pytest.mark.parametrize("own_file", ["edited", "gone"])
def test_rewards_are_those_of_the_record(tmp_path, own_file):
    run, own, totals = with_own_reward(tmp_path)
    own.unlink() if own_file == "gone" else own.write_text("def seven(answer, truth):\n    return 997\n")
    pictures.main([str(run)])
    text = (run / "pictures" / "run.html").read_text(encoding="utf-8")
    expected = {key: f"{total:.2f}" for key, total in totals.items()}
    assert rewards_on(text) == expected and f"{own}:seven 7.00" in text
    words = [text.get_text().split("\n") for text in sheet.draw_answers(run).texts]
    assert [word[1] for word in words if word[0] == "AFTER"] == [f"reward {r}" for r in expected.values()]


def test_answers_without_rewards_are_scored(tmp_path):
    run, _, totals = with_own_reward(tmp_path)
    records = read_jsonl(run / "predictions.jsonl")
    write_jsonl(run / "predictions.jsonl", [{k: r[k] for k in ("id", "completion")} for r in records])
    assert rewards_on(page_of(run)) == {key: f"{total:.2f}" for key, total in totals.items()}


def test_answers_without_rewards_whose_reward_has_gone(tmp_path):
    run, own, _ = with_own_reward(tmp_path)
    own.unlink()
    records = read_jsonl(run / "predictions.jsonl")
    write_jsonl(run / "predictions.jsonl", [{"id": "0.y4m", "completion": records[0]["completion"]}])
    said = rf"predictions\.jsonl: '0\.y4m': {own}:seven raised UserError: rewards: there is no file {own};"
    with pytest.raises(DataError, match=said):
        draw_run(run)


@pytest.mark.parametrize("rewards", [5, [], {}, {"format": 1.0}, {"total": "5"}, {"total": float("nan")}])
def test_rewards_that_are_none(tmp_path, rewards):
    run = make_run(tmp_path, videos=1)
    write_jsonl(run / "predictions.jsonl", [{"id": "0.y4m", "completion": "x", "rewards": rewards}])
    said = r"predictions\.jsonl: '0\.y4m': \"rewards\" .* are not numbers with a \"total\"; remove the key"
    with pytest.raises(DataError, match=said):
        draw_run(run)


def test_question_types(tmp_path):
    run = make_run(tmp_path, videos=2, metrics=[METRICS[0], METRICS[-1]])
    lines = read_jsonl(run / "metrics.jsonl")
    lines[-1]["interrogative"] = evaluated(70.0, 35.0, 50.0, 20.0) | {"N": 4, "failures": 0}
    write_jsonl(run / "metrics.jsonl", lines)
    (scores, *_) = Tables(page_of(run)).tables
    assert [row[0] for row in scores[1:]] == ["before", "step 12", "step 12, interrogative"]  # no summary yet
    assert scores[3][1:] == ["70.0", "35.0", "50.0", "20.0", "4", "0"]
    sample = next(iter(sheet.held_out(pictures.load_config(run / "config.yaml")).values()))
    asked = dataclasses.replace(sample, question_type="interrogative")
    assert report.title(asked) == f"{sample.sentence} (interrogative)"


# ----------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "0.y4m"}',
        '{"id": ["0.y4m"], "completion": ""}',
        '{"id": "0.y4m", "completion": 5}',
        '{"id": "x", "completion": "", "scale": [1, 1]}',
    ],
)
def test_a_bad_record_is_named(tmp_path, line):
    run = make_run(tmp_path, videos=1)
    (run / "predictions.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl(, line 1|: 'x')"):
        draw_run(run)
    assert not (run / "pictures").exists()  # nothing half-written


@pytest.mark.parametrize("line", ["{}", "[1]", "5", '{"step": 1, "id": []}', '{"step": 1, "id": "0.y4m"}'])
def test_a_bad_sampled_answer_is_named(tmp_path, line):
    run = make_run(tmp_path, videos=1)
    with (run / "rollouts.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"rollouts\.jsonl, line 13: is no JSON object with .*\"step\""):
        draw_run(run)
    write_jsonl(run / "rollouts.jsonl", [{**record, "id": "x"} for record in sampled(1)])
    with pytest.raises(DataError, match=r"rollouts\.jsonl: 'x' is no sentence of .*eval\.json"):
        draw_run(run)


@pytest.mark.parametrize("more", [{}, {"scale": 5}, {"scale": [0, 56]}, {"scale": ["28", "56"]}])
def test_a_scale_is_needed_where_it_depends_on_the_model(tmp_path, more):
    run = make_run(tmp_path, videos=1)
    write_jsonl(run / "predictions.jsonl", [{"id": "0.y4m", "completion": "x", **more}])
    draw_run(run)  # norm1000 needs none
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("coordinates: norm1000", "coordinates: resized"))
    with pytest.raises(DataError, match=r"'0\.y4m': with coordinates: resized each needs \"scale\""):
        draw_run(run)


def test_a_log_cut_by_a_kill_is_drawn_without_its_last_line(tmp_path):
    run = make_run(tmp_path, videos=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "st')
    assert len(draw_run(run)) == 4
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: is no JSON object"):
        draw_run(run)


def test_a_video_that_is_not_the_annotated_one(tmp_path):
    run = make_run(tmp_path, videos=1)
    path = tmp_path / "eval.json"
    path.write_text(path.read_text().replace('"img_num": 12', '"img_num": 40'))
    text = page_of(run)
    assert "0.y4m: lasts 6.00 s, but its annotation says 20.00 s" in text
    assert [(image == sheet.GREY).all() for image, _ in strips_of(text)] == [True]


def test_no_space_for_pictures(tmp_path, full_disk):
    run = make_run(tmp_path, videos=1)
    old = draw_run(run)[1].read_bytes()
    with full_disk(), pytest.raises(OSError) as caught:
        draw_run(run)
    curves = run / "pictures" / "curves.png"
    assert caught.value.filename == str(curves) and curves.read_bytes() == old
    files = sorted(path.name for path in (run / "pictures").iterdir())
    assert files == ["answers.png", "area.png", "curves.png", "run.html"]


def visualize_script(folder, *arguments, blocked=""):
    """The script as a user starts it; `blocked` names a package that is not installed."""
    start = f"import sys, runpy; sys.argv = {['visualize.py', *map(str, arguments)]!r}\n"
    start += f"sys.path.insert(0, {str(ROOT)!r})\n"
    if blocked:
        start += f"sys.modules[{blocked!r}] = None\n"
    start += f"runpy.run_path({str(ROOT / 'visualize.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", start], cwd=folder, capture_output=True, text=True)


def test_a_folder_that_is_no_run(tmp_path):
    done = visualize_script(tmp_path, "nothing")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: nothing: is no run (no config.yaml, metrics.jsonl); name an output_dir of train.py\n"
    )


def test_pictures_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path, videos=1)
    (run / "pictures").write_text("in the way")
    done = visualize_script(tmp_path, run)
    remedy = "free some space, or make the folder writable"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {run}/pictures: File exists; {remedy}\n"


def test_without_matplotlib(tmp_path):
    done = visualize_script(tmp_path, "nothing", blocked="matplotlib")
    assert done.returncode == 1
    assert done.stderr == "error: visualize.py needs matplotlib: pip install -r requirements-dev.txt\n"


def test_labels():
    assert label("std/spatial_pred") == "spatial_pred" and label("1 - format") == "1 - format"
    assert label("std/rewards/mine.py:smoothness") == "mine.py:smoothness"
    assert label("a" * 30 + ".py:f") == "..." + "a" * 18 + ".py:f" and len(label("x" * 99)) == 26
