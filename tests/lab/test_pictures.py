"""lab/pictures.py and lab/sheet.py: what is drawn of run folders made by hand."""

import dataclasses
import io

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox
from run_folder import METRICS, OWN, answer_text, make_run, record_of

from config import Config, load_config
from lab import page, pictures, sheet
from lab.pictures import draw_curves, draw_run, panels_of
from rewards import TERMS
from runtime.files import DataError, read_jsonl, write_jsonl


def axes_of(metrics, config):
    """title -> axes of the sheet of curves."""
    return {axes.get_title(): axes for axes in draw_curves(panels_of(metrics, config), "run").axes}


def curves_of(axes):
    """label -> y of its line, without the thin one of single steps."""
    return {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}


def test_curves_are_the_numbers_of_the_log():
    panels = axes_of(METRICS, Config(rewards={OWN: 0.0}))
    raw, line = panels["Reward of sampled answers"].lines
    rewards = [2.0 + step / 8 for step in range(1, 13)]
    assert list(raw.get_xdata()) == list(range(1, 13)) and list(raw.get_ydata()) == rewards
    assert raw.get_linestyle() == "-" and raw.get_linewidth() < line.get_linewidth() / 2
    assert line.get_ydata()[-1] == pytest.approx(np.mean(rewards[-10:]))
    assert line.get_ydata()[1] == pytest.approx(np.mean(rewards[:2]))
    scores = curves_of(panels["Held-out split, greedy answers (%)"])
    assert [list(values) for values in scores.values()] == [[80, 90], [30, 50], [40, 80], [10, 60]]
    terms = curves_of(panels["Reward terms, unweighted"])
    lines = panels["Reward terms, unweighted"].lines
    assert tuple(terms) == TERMS and len({line.get_color() for line in lines}) == len(TERMS)
    assert set(*curves_of(panels[OWN]).values()) == {-1.0}  # a reward of your own, in a panel of its own
    assert list(curves_of(panels["Loss of supervised fine-tuning"])["loss"]) == [0.7]  # of this phase alone
    assert panels["Loss of supervised fine-tuning"].lines[0].get_marker() == "o"  # or one step were unseen
    assert curves_of(panels["Seconds of a step"]).keys() == {"rollout", "step"}


def test_panels_of_a_row_are_equal_and_their_words_do_not_touch():
    """Alone (on the page) and together (curves.png), with legends of none to three rows."""
    metrics = [line | dict.fromkeys((*pictures.SHARES, "length", "grad_norm"), 0.25) for line in METRICS]
    panels = panels_of(metrics, Config(rewards={OWN: 0.0}))
    alone, sheet_ = [pictures.draw_alone(*panel) for panel in panels.items()], draw_curves(panels, "run")
    sizes = set()
    for figure in (*alone, sheet_):
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            all_of_it, numbers, legend = axes.get_tightbbox(), axes.xaxis.get_tightbbox(), axes.get_legend()
            assert not legend or legend.get_window_extent().y1 < numbers.y0
            assert np.array_equal(Bbox.union([all_of_it, figure.bbox]), figure.bbox)  # nothing is cut off
        if figure is not sheet_:
            sizes.add((round(figure.axes[0].bbox.width), round(figure.axes[0].bbox.height)))
    assert len(sizes) == 1 and len({figure.bbox.height for figure in alone}) > 2


def test_rounding_errors_are_no_curve():
    """A loss of 1e-17 is drawn as 0: no axis says 1e-17 or -0."""
    steps = list(range(1, 5))
    figure = pictures.draw_alone("Loss", {"loss": (steps, [1e-17, -2e-17, 0, -1e-17])})
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert (
        not axes.yaxis.get_offset_text().get_text()
        and "0.00" in labels
        and "\N{MINUS SIGN}0.00" not in labels
    )
    assert {value for line in axes.lines for value in line.get_ydata()} == {0}


def test_letters_without_a_font_are_said_once(capsys, recwarn):
    """U+0378 is no letter of any font; those of the other sentences may be in one that is installed."""
    sheet.say_letters_lack.cache_clear()
    for sentence in ("\u0378 \u0378", "一个穿红衣服的人", "赤い服の人が歩く", "a man 🏃🧑‍🦽 runs"):
        figure = Figure()
        figure.text(0, 0, sentence)
        sheet.save(figure, io.BytesIO(), format="png")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "some letters are in no font" in lines[0] and not recwarn.list


def test_a_run_without_thinking_boxes_has_no_curves_of_them():
    panels = panels_of(METRICS, Config(think=False))
    names = {name for curves in panels.values() for name in curves}
    assert "Tokens of an answer" not in panels  # nor has what the log does not hold
    assert not any("think" in name or name == "copied" for name in names) and "viou_pred" in names


def shown(text, **more):
    return sheet.show_answer(record_of(text, "0.y4m", **more), "AFTER", {}, Config())


def draw_strip(answer, steps=6, size=(56, 56)):
    """The strip of one answer on grey frames, one pixel of the picture a pixel of the strip, and its axes."""
    height, width = size
    clip = sheet.Clip(list(range(steps)), np.full((steps, height, width, 3), 100, np.uint8))
    figure = Figure()
    axes = figure.add_subplot()
    sheet.draw_strip(axes, clip, answer)
    return axes


def rectangles(axes, name):
    """(left, top, right, bottom) of what is drawn in a colour: outlines of boxes, and bars."""
    found = [p for p in axes.patches if p.get_edgecolor()[:3] == to_rgb(sheet.COLOURS[name])]
    corners = [(p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()) for p in found]
    boxes = [c for c, p in zip(corners, found, strict=True) if not p.get_fill()]
    bars = [c[0] for c, p in zip(corners, found, strict=True) if p.get_fill()]
    return np.array(boxes), bars


def test_outlines_stand_where_their_boxes_do_and_bars_under_their_steps():
    """Frames of 100 x 40: the true box of steps 2 and 3 is x 25 to 50, y 10 to 30."""
    axes = draw_strip(shown(answer_text(0, 100)), size=(40, 100))
    for name, left in (("truth", 25), ("think", 25), ("pred", 35)):
        boxes, bars = rectangles(axes, name)
        grow = np.array([-1, -1, 1, 1]) * sheet.GROWTH[name]  # so that equal boxes lie inside one another
        expected = [np.array([100 * step + left, 10, 100 * step + left + 25, 30]) + grow for step in (2, 3)]
        assert boxes == pytest.approx(np.array(expected))
        assert bars == ([] if name == "think" else [200, 300])
    assert axes.get_xlim() == (0, 600)


def test_what_cannot_be_drawn_is_said():
    assert shown(answer_text(0, 0)).note == ""
    flipped = answer_text(0, 0).replace("[250, 250, 500, 750]", "[500, 250, 250, 750]")
    assert shown(flipped).note == "boxes without an inside: think 2 3, pred 2 3"
    assert set(shown(flipped).boxes["truth"]) == {2, 3} and shown(flipped).boxes["pred"] == {}
    assert shown(answer_text(0, 100).replace("600", "350")).note == "boxes without an inside: pred 2 3"
    boxes = ", ".join(f"{step}. [9, 9, 9, 9]" for step in range(30))
    many = (
        f"<time> 0 - 29 </time> <think_bbox> {boxes} </think_bbox> <pred_bbox> 3. [1, 1, 2, 2] </pred_bbox>"
    )
    assert shown(many).note == "boxes without an inside: think 0 1 2 3 4 5 6 7 ..."
    malformed = shown("I see\n a cat" + 100 * "x")
    assert malformed.note.startswith("malformed: I see a cat" + 49 * "x" + "... (at character 1: '<time>' ")
    assert malformed.spans == {"truth": (2, 3)}
    cut = "malformed, cut off at max_new_tokens: <time> 2 (the text ends after '<time> 2': '-' was expected)"
    assert shown("<time> 2", truncated=True).note == cut


def sheet_of(run):
    config = load_config(run / "config.yaml")
    evaluations, samples = pictures.read_evaluations(run, METRICS, config)
    cards = page.choose_cards(evaluations, samples, config)
    return sheet.draw_sheet("run", cards)


def test_the_sheet_shows_the_worst_and_the_best(tmp_path):
    figure = sheet_of(make_run(tmp_path))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["the $quare moves_left", ""] * 8
    rows = [axes.get_ylabel().split("\n") for axes in figure.axes]
    assert [row[0] for row in rows] == ["BEFORE", "AFTER"] * 8
    assert rows[0] == ["BEFORE", "reward 0.00", "tIoU 0.00", "vIoU 0.00"]
    rewards = [float(row[1].removeprefix("reward ")) for row in rows[1::2]]
    assert rewards == sorted(rewards)
    # By hand, shift d of the width: format + consistency + temporal + 2 (GIoU - 2 d). d = 0.3 is beyond the
    # box of width 0.25: IoU 0, hull 0.55, union 0.5. d = 0.03: IoU 0.22 / 0.28 = GIoU.
    assert rewards[0] == pytest.approx(3 + 2 * (-0.05 / 0.55 - 0.6), abs=0.006)
    assert rewards[-1] == pytest.approx(3 + 2 * (0.22 / 0.28 - 0.06), abs=0.006)
    assert rows[-1][2:] == ["tIoU 1.00", f"vIoU {0.22 / 0.28:.2f}"]

    FigureCanvasAgg(figure).draw()  # no answer or its words lie upon others, or reach beyond the picture
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for k, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:k])


@pytest.mark.parametrize(("width", "height", "shape"), [(1920, 1080, (112, 200)), (2, 9000, (200, 1))])
def test_frames_are_faded_and_those_of_a_missing_video_grey(tmp_path, width, height, shape):
    config = load_config(make_run(tmp_path, videos=1, seconds=30) / "config.yaml")
    sample = page.load_by_id(config.eval_annotations, config)["0.y4m"]
    clip = sheet.read_shown_clip(sample, 1.0)
    assert (clip.steps[0], clip.steps[-1], len(clip.steps), clip.error) == (0, 29, 12, "")
    luma = (100 - 16) * 255 / 219
    assert abs(clip.frames[:, :, :-2] - (255 - 0.6 * (255 - luma))).max() <= 2
    missing = dataclasses.replace(sample, video="gone.mp4", width=width, height=height)
    clip = sheet.read_shown_clip(missing, 1.0)
    assert clip.frames.shape == (12, *shape, 3) and clip.error.startswith("gone.mp4: ")


def test_pictures_of_a_run(tmp_path, capsys):
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "st')  # cut by a kill
    pictures.main([str(run)])
    paths = [run / "pictures" / name for name in ("run.html", "curves.png", "area.png", "answers.png")]
    assert capsys.readouterr() == ("".join(f"{path}\n" for path in paths), "")
    for path, names in zip(paths[2:], (("think", "pred"), ("truth", "think", "pred")), strict=True):
        pixels = (imread(path)[:, :, :3] * 255).round()
        for name in names:
            assert (pixels == np.round(255 * np.array(to_rgb(sheet.COLOURS[name])))).all(2).any()


def test_bars_are_the_mean_viou_of_each_size(tmp_path):
    """All true boxes take 0.125 of the frame; the lists are the same, off by 30 k thousandths of it."""
    run = make_run(tmp_path)
    config = load_config(run / "config.yaml")
    evaluations, samples = pictures.read_evaluations(run, METRICS, config)
    (axes,) = pictures.draw_areas(evaluations["AFTER"], samples, config).axes
    mean = np.mean([max(250 - 30 * k, 0) / (250 + 30 * k) for k in range(1, 11)])
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * mean] * 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9-16\nN = 10"]


def test_a_run_in_training_and_one_that_has_just_begun(tmp_path):
    run = make_run(tmp_path, videos=2)
    (run / "predictions.jsonl").unlink()
    write_jsonl(METRICS[:1], run / "metrics.jsonl")
    assert [path.name for path in draw_run(run)] == ["run.html", "curves.png", "area.png", "answers.png"]
    for name in ("predictions_before", "watched"):
        (run / f"{name}.jsonl").unlink()
    write_jsonl([], run / "metrics.jsonl")
    assert [path.name for path in draw_run(run)] == ["run.html", "curves.png"]


def test_a_run_that_learned_nothing_says_so(tmp_path):
    """The bars by size are left out only if no answer of the last evaluation parses."""
    run, bad = make_run(tmp_path, videos=2), record_of("<time> 2", "0.y4m", truncated=True)
    (run / "watched.jsonl").unlink()
    (run / "predictions_before.jsonl").unlink()
    write_jsonl([bad, read_jsonl(run / "predictions.jsonl")[1]], run / "predictions.jsonl")
    assert "area.png" in [path.name for path in draw_run(run)]
    assert "warning, in" not in (run / "pictures" / "run.html").read_text(encoding="utf-8")
    write_jsonl([bad, bad | {"id": "1.y4m"}], run / "predictions.jsonl")
    steps = [line | {"warning": "cut off"} if line["phase"] == "grpo" else line for line in METRICS]
    write_jsonl(steps, run / "metrics.jsonl")
    assert [path.name for path in draw_run(run)] == ["run.html", "curves.png", "answers.png"]
    text = (run / "pictures" / "run.html").read_text(encoding="utf-8")
    warning = (
        "<p><em>warning, in 12 of 12 steps: most answers are cut off, and earn nothing: raise max_new_tokens"
    )
    assert warning in text.partition("</h1>\n")[2][: len(warning)] and "vIoU by area" not in text


def test_evaluations_along_the_way(tmp_path):
    """5 of the 7, evenly, in the order of the steps; other files are none of them."""
    run = make_run(tmp_path, videos=2)
    for step in (2, 10, 4, 6, 8):
        (run / f"predictions_{step}.jsonl").write_bytes((run / "predictions.jsonl").read_bytes())
    (run / "predictions_blank.jsonl").write_text("no evaluation")
    metrics = [{"phase": "eval", "step": step} for step in (0, 2, 4, 6, 8, 10, 12)]
    config = load_config(run / "config.yaml")
    evaluations, samples = pictures.read_evaluations(run, metrics, config)
    assert list(evaluations) == ["BEFORE", "STEP 4", "STEP 6", "STEP 8", "AFTER"]
    cards = page.choose_cards(evaluations, samples, config)
    assert [answer.title for answer in cards[0].answers] == list(evaluations)


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DataError, match="is no run"):
        draw_run(tmp_path)
    run = make_run(tmp_path, videos=1)
    (record,) = read_jsonl(run / "predictions.jsonl")
    write_jsonl([record | {"id": "x"}], run / "predictions.jsonl")
    with pytest.raises(DataError, match=r"predictions\.jsonl: 'x' is no sentence of .*all\.json"):
        draw_run(run)
    assert not (run / "pictures").exists()  # nothing half-written
