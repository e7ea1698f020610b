"""Pictures of a run: the curves of its training, and its answers drawn on the frames.

    python visualize.py runs/toy

    RUN/pictures/curves.png     reward and its terms, IoU of the sampled answers, KL, greedy held-out scores
    RUN/pictures/answers.png    held-out answers from the worst to the best, before and after training: truth
                                green, think boxes blue, pred boxes red (STVG-o1, Fig. 3)

Reads what train.py wrote (metrics.jsonl, predictions.jsonl, config.yaml) and the videos; needs matplotlib.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, load_config
from data import Sample, check_videos, load_samples
from evaluate import read_predictions, scale_of
from files import DataError, read_jsonl, run_script, write_whole
from metrics import native_scores, tube_from_answer
from prompts import Box, Truth
from rewards import TERMS, Score, is_valid, score
from video import read_clip, resize

try:
    from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
    from matplotlib.lines import Line2D
except ImportError:
    sys.exit("error: visualize.py needs matplotlib: pip install -r requirements-dev.txt")

COLOURS = {"truth": (0, 150, 40), "think": (30, 90, 255), "pred": (225, 20, 20)}  # Fig. 3, RGB
DPI = 100
WINDOW = 10  # steps that a thick curve averages over


def draw_run(run: Path) -> list[Path]:
    """Draw a run folder of train.py, also while it is still training (then without answers.png).

    Returns the paths of the pictures. Raises DataError where the folder is no run or a record cannot be read;
    but a last line of metrics.jsonl that is cut, by the end of a killed run, is left out. OSError where
    a picture cannot be written.
    """
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: is no run (no {', '.join(missing)}); name an output_dir of train.py")
    metrics = read_jsonl(run / "metrics.jsonl", "phase", "step", skip_cut=True)
    figures = {"curves.png": draw_curves(metrics, run.resolve().name)}
    if (run / "predictions.jsonl").is_file():
        figures["answers.png"] = draw_answers(run)
    paths = [run / "pictures" / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save_figure(figure, path)
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file whole or not at all; its folder is made. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    write_whole(path, picture.getvalue())


# ----------------------------------------------------------------------------------------------------------
# Curves

# Title, phase of the lines in metrics.jsonl, and the metrics drawn (README, "Glossary")
PANELS = (
    ("Reward of sampled answers", "grpo", ("reward",)),
    ("Reward terms, unweighted", "grpo", TERMS),
    ("IoU of sampled answers, on steps", "grpo", ("tiou", "viou_think", "viou_pred")),
    ("Held-out split, greedy answers (%)", "eval", ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")),
    ("KL to the reference", "grpo", ("kl",)),
    ("Spread of rewards within a group", "grpo", ("reward_std",)),
    ("Shares to watch", "grpo", ("overlap", "copied", "zero_spread", "truncated")),
    ("Loss of supervised fine-tuning", "sft", ("loss",)),
)
BLUE, RED, PURPLE, ORANGE, TEAL, GREY = "#1e5aff", "#e11414", "#7a3fb0", "#e69f00", "#00a3a3", "#999999"
CURVE_COLOURS = {"format": GREY, "consistency": ORANGE, "temporal": PURPLE, "think": TEAL}  # others are black
CURVE_COLOURS |= {"spatial_think": BLUE, "spatial_pred": RED, "viou_think": BLUE, "viou_pred": RED}
CURVE_COLOURS |= {"overlap": PURPLE, "copied": BLUE, "zero_spread": ORANGE, "truncated": GREY}
CURVE_COLOURS |= {"tiou": PURPLE, "m_tIoU": PURPLE, "m_vIoU": RED, "vIoU@0.3": ORANGE, "vIoU@0.5": TEAL}


def draw_curves(metrics: list[dict], title: str) -> Figure:
    """One panel for each of PANELS that the run has lines of: single steps thin, means over WINDOW steps
    thick, evaluations as markers."""
    panels = []
    for name, phase, names in PANELS:
        curves = {metric: curve(metrics, phase, metric) for metric in names}
        curves = {metric: points for metric, points in curves.items() if points[0]}
        if curves:
            panels.append((name, phase, curves))
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(15, 4 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}  (thin: each step, thick: mean of the last {WINDOW})", fontsize=13)
    for k, (name, phase, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, k + 1, title=name, xlabel="optimiser step")
        for metric, (steps, values) in curves.items():
            colour = CURVE_COLOURS.get(metric, "black")
            if phase == "eval":
                axes.plot(steps, values, "o-", color=colour, label=metric)
            else:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(steps, trailing_mean(values, WINDOW), color=colour, linewidth=2.2, label=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if phase == "eval":
            axes.set_ylim(0, 100)
        if len(curves) > 1:  # below the axes, where it covers no curve
            ncols = 2 if len(curves) == 4 else 3
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=ncols, frameon=False)
    return figure


def curve(metrics: list[dict], phase: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, from the lines of one phase that have it."""
    lines = [line for line in metrics if line["phase"] == phase and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def trailing_mean(values: list[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values, of fewer at the beginning."""
    return [float(np.mean(values[max(0, k + 1 - window) : k + 1])) for k in range(len(values))]


# ----------------------------------------------------------------------------------------------------------
# Boxes on frames

LIGHT = 0.6  # what is left of a frame's contrast with white


def overlay(frame: np.ndarray, boxes: dict[str, Box], side: int) -> np.ndarray:
    """A frame brought to a longer side of about `side` pixels, with outlines of the boxes.

    frame: uint8 (H, W, 3). boxes: key of COLOURS -> box in [0, 1]; one without an inside is not drawn. The
    frame is lightened, so that outlines show on any colour. They are 2 pixels wide and lie inside one another
    (truth, think, pred), so that equal boxes are all seen. Returns uint8 (h, w, 3).
    """
    image = (255 - (255 - fit(frame, side)) * LIGHT).astype(np.uint8)
    height, width = image.shape[:2]
    ys, xs = np.mgrid[:height, :width]
    for first, (name, colour) in zip((-2, 0, 2), COLOURS.items(), strict=True):
        if name in boxes and is_valid(boxes[name]):
            left, top, right, bottom = (round(v * (width, height)[k % 2]) for k, v in enumerate(boxes[name]))
            # How far inside the box a pixel lies: 0 on its border, negative outside, (h, w).
            depth = np.minimum.reduce([xs - left, right - 1 - xs, ys - top, bottom - 1 - ys])
            first = min(first, depth.max() - 1)  # a box with no room for its line gets it further out
            image[(depth >= first) & (depth < first + 2)] = colour
    return image


def fit(frame: np.ndarray, side: int) -> np.ndarray:
    """A frame whose longer side is about `side` pixels. Small ones are enlarged by a whole factor, pixel by
    pixel, so that they stay sharp."""
    longest = max(frame.shape[:2])
    if longest <= side:
        factor = round(side / longest)
        return frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(n * side / longest)) for n in frame.shape[:2])
    return resize(frame[None], (width, height))[0].numpy()


# ----------------------------------------------------------------------------------------------------------
# The contact sheet. All sizes are in pixels of the picture

SAMPLES = 8  # sentences shown
STEPS = 12  # frames shown of a clip, at most
SIDE, WIDE = 168, 1900  # longer side of a frame, at most; what the frames of a row may take together, about
SCREEN = 2600  # two columns, where they are not wider than this
GAP, BAR = 4, 6  # between frames; height of the bars that mark the spans
MARGIN, HEADER, LINE = 160, 90, 30  # left of the frames, with the scores; above all; a line of text
PALE = (226, 226, 226)  # a bar outside its span


@dataclass
class Row:
    """An answer, drawn and scored."""

    name: str  # "BEFORE", "AFTER" or "STEP 100"
    scored: Score
    scale: tuple[int, int]  # of the text's coordinates
    native: dict[str, float]  # tIoU and vIoU on native frames, as in the paper's tables


@dataclass
class Block:
    """A sentence on the sheet: its rows of frames, one beneath the other, and texts beside them."""

    image: np.ndarray  # uint8 (h, w, 3)
    texts: list[tuple[float, float, str, dict]]  # x, y from the upper left corner, words, how to write them


def draw_answers(run: Path, predictions: str = "predictions.jsonl", name: str = "AFTER") -> Figure:
    """The contact sheet: SAMPLES held-out sentences, evenly from the worst to the best reward of the answers
    in a file of the run folder. Those before training are drawn above them. name: what the former are
    called. Raises DataError for records that cannot be used, VideoError."""
    config = load_config(run / "config.yaml")
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)
    known = {sample.id: sample for sample in samples}
    final = read_rows(run / predictions, name, known, config)
    before = {}
    if predictions != "predictions_before.jsonl" and (run / "predictions_before.jsonl").is_file():
        before = read_rows(run / "predictions_before.jsonl", "BEFORE", known, config)
    ranked = sorted(final, key=lambda key: final[key].scored.rewards["total"])
    places = np.linspace(0, len(ranked) - 1, min(SAMPLES, len(ranked))).round().astype(int)
    chosen = [ranked[place] for place in places]
    check_videos([known[key] for key in chosen])
    seconds = config.text_format.step_seconds
    blocks = [
        draw_block(known[k], [rows[k] for rows in (before, final) if k in rows], seconds) for k in chosen
    ]
    title = f"{run.resolve().name}: held-out answers, worst to best of {len(ranked)}, down the columns"
    return lay_out(blocks, f"{title} (one step = {seconds:g} s)")


def read_rows(path: Path, name: str, known: dict[str, Sample], config: Config) -> dict[str, Row]:
    """id -> answer, scored again: only its text is needed, and what scale_of needs. Sentences whose videos
    could not be read are left out. Raises DataError."""
    rows = {}
    for record in read_predictions(path):
        if "unreadable" in record:
            continue
        if record["id"] not in known:
            raise DataError(f"{path}: {record['id']!r} is no sentence of {config.eval_annotations}")
        sample = known[record["id"]]
        scale = scale_of(record, sample, config)
        truth = sample.truth(config.text_format.step_seconds)
        scored = score(record["completion"], truth, scale, config.rewards, config.think)
        tube = tube_from_answer(scored.answer, sample, config.text_format, scale)
        rows[sample.id] = Row(name, scored, scale, native_scores(tube, sample))
    if not rows:
        raise DataError(f"{path}: holds no answers; write it again with evaluate.py")
    return rows


def draw_block(sample: Sample, rows: list[Row], step_seconds: float) -> Block:
    """The frames of at most STEPS steps, evenly over the clip, once for each row."""
    truth, num_steps = sample.truth(step_seconds), sample.grid(step_seconds).num_steps
    steps = np.linspace(0, num_steps - 1, min(num_steps, STEPS)).round().astype(int).tolist()
    frames = read_clip(sample, [i * step_seconds for i in steps])
    steps = steps[: len(frames)]  # a file may end early
    side = min(SIDE, max(SIDE // 2, WIDE // len(steps)))
    strips, texts, top = [], [], LINE
    for row in rows:
        strip = draw_strip(frames, steps, truth, row, side)
        short = max(0, 4 * LINE - len(strip))  # room for the four lines beside it
        strips.append(np.pad(strip, ((0, short), (0, 0), (0, 0)), constant_values=255))
        texts.append((MARGIN - 12, top + len(strips[-1]) / 2, _scores(row), {"ha": "right", "va": "center"}))
        top += len(strips[-1])
    image = np.pad(np.concatenate(strips), ((LINE, LINE), (MARGIN, 0), (0, 0)), constant_values=255)
    width = image.shape[1] - MARGIN
    words = f"{sample.sentence} ({sample.question_type})" if sample.question_type else sample.sentence
    most = max(width // 11, 20)
    title = words if len(words) <= most else f"{words[: most - 4]} ..."
    texts.append((MARGIN, LINE / 2, title, {"va": "center", "weight": "bold"}))
    for k, step in enumerate(steps):
        x = MARGIN + (k + 0.5) * width / len(steps) - GAP / 2
        words = f"step {step}" if k == 0 else str(step)
        texts.append((x, top, words, {"ha": "center", "va": "top", "color": "0.45"}))
    return Block(image, texts)


def draw_strip(frames: np.ndarray, steps: list[int], truth: Truth, row: Row, side: int) -> np.ndarray:
    """One answer on the frames (T, H, W, 3) of T steps, side by side: uint8 (h, w, 3). Under a frame there is
    a green bar where the step is in the true span, and a red one where it is in the answer's."""
    answer = row.scored.answer
    boxes = {"truth": truth.boxes, "think": {}, "pred": {}}
    spans = {"truth": truth.span, "pred": (0, -1)}
    if answer is not None:
        spans["pred"] = (answer.start, answer.end)
        framed = answer.in_frame(row.scale)
        boxes |= {"think": framed.think_boxes, "pred": framed.pred_boxes}
    tiles = []
    for frame, step in zip(frames, steps, strict=True):
        here = {name: items[step] for name, items in boxes.items() if step in items}
        parts = [overlay(frame, here, side)]
        for name, (first, last) in spans.items():
            bar = np.full((BAR + 2, parts[0].shape[1], 3), 255, np.uint8)
            bar[2:] = COLOURS[name] if first <= step <= last else PALE
            parts.append(bar)
        tiles.append(np.pad(np.concatenate(parts), ((0, 2 * GAP), (0, GAP), (0, 0)), constant_values=255))
    return np.concatenate(tiles, axis=1)


def _scores(row: Row) -> str:
    lines = [row.name, f"reward {row.scored.rewards['total']:.2f}"]
    if row.scored.answer is None:
        return "\n".join([*lines, "malformed"])
    return "\n".join([*lines, *(f"{name} {row.native[name]:.2f}" for name in ("tIoU", "vIoU"))])


def lay_out(blocks: list[Block], title: str) -> Figure:
    """The blocks beneath one another, in two columns where they fit on a screen, read downwards."""
    height = max(len(block.image) for block in blocks)
    width = max(block.image.shape[1] for block in blocks) + 20
    columns = 2 if len(blocks) > 3 and 2 * width <= SCREEN else 1
    rows = -(-len(blocks) // columns)
    size = max(columns * width, 1200), HEADER + rows * height  # wide enough for the header
    canvas = np.full((size[1], size[0], 3), 255, np.uint8)
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    for k, block in enumerate(blocks):
        left, top = k // rows * width, HEADER + k % rows * height
        canvas[top : top + block.image.shape[0], left : left + block.image.shape[1]] = block.image
        for x, y, words, style in block.texts:
            _write(figure, left + x, top + y, words, size, **style)
    figure.figimage(canvas, origin="upper")
    _write(figure, 14, 26, title, size, va="center", weight="bold", fontsize=16)
    lines = [Line2D([], [], color=np.array(colour) / 255, linewidth=4) for colour in COLOURS.values()]
    names = ["truth", "think boxes", "pred boxes   (bars: steps of the true and of the answered span)"]
    place = {"loc": "center left", "bbox_to_anchor": (4 / size[0], 1 - 60 / size[1])}
    figure.legend(lines, names, **place, ncols=3, frameon=False, fontsize=14)
    return figure


def _write(figure: Figure, x: float, y: float, words: str, size: tuple[int, int], **style) -> None:
    """Words at a pixel counted from the upper left corner; `$` is no mathematics."""
    figure.text(x / size[0], 1 - y / size[1], words, **{"fontsize": 13, "parse_math": False, **style})


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    if len(arguments) != 1:
        sys.exit("usage: python visualize.py RUN")
    for path in draw_run(Path(arguments[0])):
        print(path)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output", "free some space, or make the folder writable")
