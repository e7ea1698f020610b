"""visualize.py: pixels of the pictures and numbers of the curves, from run folders made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

import visualize
from config import Config, save_config
from data import load_samples
from files import DataError, read_jsonl
from prompts import Answer, Truth, format_answer, truth_answer
from rewards import TERMS, score
from video import VideoError
from visualize import COLOURS, Row, curve, draw_curves, draw_run, draw_strip, fit, overlay, trailing_mean

ROOT = Path(__file__).parent.parent
GREEN, BLUE, RED = (COLOURS[name] for name in ("truth", "think", "pred"))
GREY = 255 - round((255 - 100) * visualize.LIGHT)  # what becomes of a pixel of 100


def grey_frames(count, size=56):
    return np.full((count, size, size, 3), 100, np.uint8)


# ----------------------------------------------------------------------------------------------------------
# A run folder as train.py writes it, of grey videos


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(folder, videos=10, seconds=6):
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
    config = Config(
        eval_annotations=str(folder / "eval.json"), videos=str(folder / "videos"), time_unit="second"
    )
    save_config(config, run / "config.yaml")
    for name, scale in (("predictions_before", 1.5), ("predictions", 1)):
        records = []
        for k in range(videos):
            shift = round(scale * (300 - 30 * k))
            items = tuple((step, (250 + shift, 250, 500 + shift, 750)) for step in (2, 3))
            text = format_answer(Answer(2, 3, items, items)) if k or scale == 1 else "<time> 2"
            records.append({"id": f"{k}.y4m", "completion": text, "scale": [1000, 1000]})
        write_jsonl(run / f"{name}.jsonl", records)
    write_jsonl(run / "metrics.jsonl", METRICS)
    return run


METRICS = [
    {"phase": "eval", "step": 0, "m_tIoU": 80.0, "m_vIoU": 30.0, "vIoU@0.3": 40.0, "vIoU@0.5": 10.0},
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
            **dict.fromkeys(("overlap", "copied", "zero_spread", "truncated"), 0.25),
        }
        for step in range(1, 13)
    ],
    {"phase": "eval", "step": 12, "m_tIoU": 90.0, "m_vIoU": 50.0, "vIoU@0.3": 80.0, "vIoU@0.5": 60.0},
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
    strip = draw_strip(grey_frames(5), list(range(5)), truth, Row("AFTER", scored, (1000, 1000), {}), 56)
    tiles = [strip[:, k * (56 + visualize.GAP) :][:, :56] for k in range(5)]
    under = [tile[56:, 28].tolist() for tile in tiles]
    assert [list(GREEN) in column for column in under] == [False, True, True, False, False]
    assert [list(RED) in column for column in under] == [False, False, True, True, False]
    boxed = [{name for name, c in COLOURS.items() if (tile[:56] == c).all(2).any()} for tile in tiles]
    assert boxed == [set(), {"truth"}, {"truth", "think", "pred"}, {"think", "pred"}, set()]


# ----------------------------------------------------------------------------------------------------------
# Curves


def test_curves_are_the_numbers_of_the_log():
    assert curve(METRICS, "sft", "loss") == ([1], [0.7])  # not the loss of the other phase
    assert curve(METRICS, "eval", "m_vIoU") == ([0, 12], [30.0, 50.0])
    panels = {axes.get_title(): axes.get_lines() for axes in draw_curves(METRICS, "run").axes}
    thin, thick = panels["Reward of sampled answers"]
    assert thin.get_xdata().tolist() == list(range(1, 13))
    assert thin.get_ydata().tolist() == [2.0 + step / 8 for step in range(1, 13)]
    assert thick.get_ydata()[-1] == pytest.approx(2 + np.mean(range(3, 13)) / 8)  # the last 10 of 12
    scores = {
        line.get_label(): line.get_ydata().tolist() for line in panels["Held-out split, greedy answers (%)"]
    }
    assert scores == {
        "m_tIoU": [80.0, 90.0],
        "m_vIoU": [30.0, 50.0],
        "vIoU@0.3": [40.0, 80.0],
        "vIoU@0.5": [10.0, 60.0],
    }
    assert {line.get_label() for line in panels["Reward terms, unweighted"]} >= set(TERMS)
    assert len(panels) == len(visualize.PANELS)


def test_a_panel_without_numbers_is_left_out():
    no_kl = [{"phase": "grpo", "step": 1, "reward": 1.0}]
    assert [axes.get_title() for axes in draw_curves(no_kl, "run").axes] == ["Reward of sampled answers"]
    assert draw_curves([], "run").axes == []


def test_trailing_mean_by_hand():
    assert trailing_mean([4.0, 2.0, 6.0, 1.0], 3) == [4.0, 3.0, 4.0, 3.0]


# ----------------------------------------------------------------------------------------------------------
# A whole run


def test_pictures_of_a_run(tmp_path):
    run = make_run(tmp_path)
    paths = draw_run(run)
    assert paths == [run / "pictures" / "curves.png", run / "pictures" / "answers.png"]
    curves, answers = ((imread(path)[:, :, :3] * 255).round().astype(np.uint8) for path in paths)
    for colour in (visualize.RED, visualize.ORANGE, visualize.TEAL):
        assert (curves == [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).all(2).any()
    green, blue, red = ((answers == colour).all(2).sum() for colour in COLOURS.values())
    # 8 sentences before and after; one truth box of 42 x 84 px in 2 steps of each, drawn at full length
    # where nothing crosses it, one answer of the 16 malformed. Bars and the legend add to it.
    assert green > 16 * 2 * 2 * 168 and blue > 15 * 2 * 150 and red > 15 * 2 * 2 * 168


def test_the_sheet_shows_the_worst_and_the_best(tmp_path):
    run = make_run(tmp_path)
    words = [text.get_text() for text in visualize.draw_answers(run).texts]
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
        words = [text.get_text() for text in visualize.draw_answers(run, name, step).texts]
        assert [word.split("\n")[0] for word in words if "\n" in word] == expected


def test_texts_of_the_sheet_do_not_overlap(tmp_path):
    run = make_run(tmp_path)
    figure = visualize.draw_answers(run)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in [*figure.texts, *figure.legends[0].get_texts()]]
    assert len(boxes) > 70
    for k, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:k])


def test_long_clips_show_twelve_steps(tmp_path):
    run = make_run(tmp_path, videos=1, seconds=30)
    words = [text.get_text() for text in visualize.draw_answers(run).texts]
    steps = [int(word) for word in words if word.isdigit()]
    assert len(steps) == 11 and steps[-1] == 29  # "step 0" is the twelfth


def test_a_run_in_training_has_its_curves(tmp_path):
    run = make_run(tmp_path)
    (run / "predictions.jsonl").unlink()
    assert [path.name for path in draw_run(run)] == ["curves.png"]


def test_a_perfect_answer_is_last(tmp_path):
    run = make_run(tmp_path, videos=3)
    samples, _ = load_samples("hcstvg", str(tmp_path / "eval.json"), str(tmp_path / "videos"))
    perfect = format_answer(truth_answer(samples[0].truth(1.0), (1000, 1000)))
    records = read_jsonl(run / "predictions.jsonl", "completion")
    records[0]["completion"] = perfect
    write_jsonl(run / "predictions.jsonl", records)
    words = [text.get_text() for text in visualize.draw_answers(run).texts]
    assert [w for w in words if w.startswith("AFTER")][-1] == "AFTER\nreward 5.00\ntIoU 1.00\nvIoU 1.00"


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
    assert len(draw_run(run)) == 2
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line {len(METRICS) + 1}: is no JSON object"):
        draw_run(run)


def test_a_video_that_is_not_the_annotated_one(tmp_path):
    run = make_run(tmp_path, videos=1)
    path = tmp_path / "eval.json"
    path.write_text(path.read_text().replace('"img_num": 12', '"img_num": 40'))
    with pytest.raises(VideoError, match=r"0\.y4m: lasts 6\.00 s, but its annotation says 20\.00 s"):
        draw_run(run)


def test_no_space_for_pictures(tmp_path, full_disk):
    run = make_run(tmp_path, videos=1)
    old = draw_run(run)[0].read_bytes()
    with full_disk(), pytest.raises(OSError) as caught:
        draw_run(run)
    curves = run / "pictures" / "curves.png"
    assert caught.value.filename == str(curves) and curves.read_bytes() == old
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["answers.png", "curves.png"]


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
