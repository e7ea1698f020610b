"""Draw a run: its curves, its answers on the frames, and a page.

    python -m lab.pictures RUN [RUN ...]

    RUN/pictures/run.html       scores, curves, sampled answers along the training, all held-out answers: one
                                file, to be opened in a browser
    RUN/pictures/curves.png     the curves of metrics.jsonl (docs/glossary.md)
    RUN/pictures/area.png       vIoU of think and pred boxes by the size of the subject (STVG-o1, Fig. 4);
                                not if no answer parses
    RUN/pictures/answers.png    held-out answers from the worst to the best, before and after training: truth
                                green, think boxes blue, pred boxes red (STVG-o1, Fig. 3)

Reads what train.py wrote (metrics.jsonl, watched.jsonl, predictions*.jsonl, config.yaml) and the videos; the
frames of missing videos are grey. Rewards are those in the files. Needs matplotlib (requirements-dev.txt).
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot

from config import Config, load_config
from lab import page, sheet
from lab.sheet import Evaluations, ShownAnswer
from metrics import COLUMNS, native_scores, tube_of, viou_by_area
from rewards import TERMS
from runtime.files import DataError, read_jsonl, run_script, write_whole
from runtime.plugins import plugin_names
from samples import Sample

EVALUATIONS = 5  # shown at most


def draw_run(run: Path) -> list[Path]:
    """Draw a run folder of train.py, also while it is still training (with what there is).

    Returns the paths of the page and the pictures. Videos that cannot be read are named on stderr. Raises
    DataError where the folder is no run or a record cannot be used, OSError where it cannot be written.
    """
    if not (run / "metrics.jsonl").is_file():
        raise DataError(f"{run}: is no run (no metrics.jsonl); name an output_dir of train.py")
    config, name = load_config(run / "config.yaml"), run.resolve().name
    metrics = read_jsonl(run / "metrics.jsonl", "phase", "step", skip_cut=True)
    panels = panels_of(metrics, config)
    pictures = {"curves.png": draw_curves(panels, name)}
    figures = {title: draw_alone(title, curves) for title, curves in panels.items()}
    evaluations, samples = read_evaluations(run, metrics, config)
    cards = page.choose_cards(evaluations, samples, config)
    if cards:
        *_, last = evaluations.values()
        if any("pred" in answer.spans for answer in last.values()):  # some answer parses
            pictures["area.png"] = figures["vIoU by area"] = draw_areas(last, samples, config)
        pictures["answers.png"] = sheet.draw_sheet(name, cards)
    text, unread = page.render(run, config, metrics, figures, evaluations, samples, cards)
    for file, figure in pictures.items():
        save_figure(figure, run / "pictures" / file)
    write_whole(run / "pictures" / "run.html", text.encode(errors="replace"))
    if unread:
        print(unread, file=sys.stderr)
    return [run / "pictures" / file for file in ("run.html", *pictures)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file whole or not at all; its folder is made. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    sheet.save(figure, picture := io.BytesIO(), dpi=sheet.DPI, format="png")
    write_whole(path, picture.getvalue())


def read_evaluations(run: Path, metrics: list[dict], config: Config) -> tuple[Evaluations, dict[str, Sample]]:
    """Read the answers of at most EVALUATIONS evaluations of a run, and id -> held-out sentence.

    Sentences whose videos could not be read are left out. Raises DataError for an unknown sentence.
    """
    steps = [line["step"] for line in metrics if line["phase"] == "eval"]
    files = {"BEFORE": "_before"} | {f"STEP {step}": f"_{step}" for step in steps} | {"AFTER": ""}
    paths = [(name, run / f"predictions{suffix}.jsonl") for name, suffix in files.items()]
    paths = [(name, path) for name, path in paths if path.is_file()]
    samples, evaluations = page.load_by_id(config.eval_annotations, config) if paths else {}, {}
    for name, path in sheet.evenly(paths, EVALUATIONS):
        for record in read_jsonl(path, "id", "completion", "truth", "scale"):
            key = record["id"]
            if key not in samples:
                raise DataError(f"{path}: {key!r} is no sentence of {config.eval_annotations}")
            if "unreadable" not in record:
                native = native_scores(tube_of(record, samples[key], config), samples[key])
                scores = {"reward": record["rewards"]["total"]} | {k: native[k] for k in ("tIoU", "vIoU")}
                evaluations.setdefault(name, {})[key] = sheet.show_answer(record, name, scores, config)
    return evaluations, samples


def draw_areas(answers: dict[str, ShownAnswer], samples: dict[str, Sample], config: Config) -> Figure:
    """Draw the mean vIoU of think and pred boxes by the subject's share of the frame (STVG-o1, Fig. 4)."""
    asked, scores = [samples[key] for key in answers], {}
    for name in ("think", "pred") if config.think else ("pred",):
        tubes = [tube_of(answers[sample.id].record, sample, config, name) for sample in asked]
        scores[name] = [native_scores(tube, sample) for tube, sample in zip(tubes, asked, strict=True)]
    bins = [row for row in viou_by_area(asked, scores) if row["N"]]
    axes = lone_axes(below=1.15)
    for k, name in enumerate(scores):
        places, width = np.arange(len(bins)) + 0.4 * k, 0.8 / len(scores)
        style_of = {"align": "edge", "color": sheet.COLOURS[name], "label": f"{name} boxes"}
        axes.bar(places, [row[name] for row in bins], width, **style_of)
    labels = [f"{100 * row['low']:g}-{100 * row['high']:g}\nN = {row['N']}" for row in bins]
    axes.set_xticks(np.arange(len(bins)) + 0.4, labels, fontsize=9)
    axes.set_xlabel("true boxes / frame, by area (%)\nN: sentences")
    style(axes, "Held-out vIoU (%) by size of the subject")
    axes.set_axisbelow(True)
    axes.figure.legend(loc="lower center", frameon=False, ncols=2)
    return axes.figure


SHARES = "overlap", "one_step", "invalid_boxes", "out_of_frame", "copied", "truncated", "zero_spread"
PARTS = "step", "decode", "rollout", "score", "reference", "update", "wait"
PANELS = {  # title -> phase and keys of lines of metrics.jsonl
    "Reward of sampled answers": ("grpo", ("reward",)),
    "Reward terms, unweighted": ("grpo", TERMS),
    "Held-out split, greedy answers (%)": ("eval", COLUMNS),
    "IoU of sampled answers, in steps": ("grpo", ("tiou", "viou_think", "viou_pred")),
    "Loss, KL, gradient norm": ("grpo", ("loss", "kl", "grad_norm")),
    "Answered steps / true steps": ("grpo", ("span_ratio",)),
    "Tokens of an answer": ("grpo", ("length",)),
    "Diagnostics of sampled answers": ("grpo", (*SHARES, "drift")),
    "Seconds of a step": ("grpo", tuple(f"seconds/{part}" for part in PARTS)),
    "Loss of supervised fine-tuning": ("sft", ("loss",)),
}
CYCLE = ("black", "#e69f00", "#7a3fb0", "#00a3a3", "#d6579b", "#8c5a2b", "#8a8f95", "#3c9a3c")
Curves = dict[str, tuple[list[int], list[float]]]  # name -> optimiser steps, values


def panels_of(metrics: list[dict], config: Config) -> dict[str, Curves]:
    """Collect the curves of each panel: title -> curves. A reward of your own has a panel to itself."""
    flat = [line | {f"seconds/{k}": v for k, v in line.get("seconds", {}).items()} for line in metrics]
    panels = {}
    for title, (phase, names) in (PANELS | {n: ("grpo", (n,)) for n in plugin_names(config.rewards)}).items():
        for name in names:
            lines = [line for line in flat if line["phase"] == phase and name in line]
            if lines and (config.think or not ("think" in name or name == "copied")):
                points = [line["step"] for line in lines], [line[name] for line in lines]
                panels.setdefault(title, {})[name] = points
    return panels


def draw_curves(panels: dict[str, Curves], title: str) -> Figure:
    """Draw all panels on a sheet with a title."""
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(15, 3.8 * rows), dpi=sheet.DPI, layout="constrained")
    figure.suptitle(f"{title}  ({page.HOW_TO_READ})", fontsize=13, parse_math=False)
    for k, (name, curves) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(rows, 3, k + 1), name, curves)
    return figure


def draw_alone(title: str, curves: Curves) -> Figure:
    """Draw one panel by itself."""
    lines = -(-len(curves) // legend_columns(curves)) if len(curves) > 1 else 0
    axes = lone_axes(below=0.4 + 0.2 * lines)
    draw_panel(axes, title, curves)
    return axes.figure


def lone_axes(below: float) -> Axes:
    """Axes on a figure of their own, with `below` inches for what stands below. All such axes have one size,
    so that those in a row of the page are equal."""
    height = 0.35 + 2.8 + below
    figure = Figure(figsize=(5, height), dpi=sheet.DPI)
    return figure.add_axes((0.12, below / height, 0.86, 2.8 / height))


def legend_columns(curves: Curves) -> int:
    return 4 if len(curves) == 4 else 3


def draw_panel(axes: Axes, title: str, curves: Curves) -> None:
    """Draw values as a thin, faint line and their trailing mean as a thick one; the few of evaluations, which
    are not averaged, as dots that are joined."""
    spare = iter(CYCLE)
    for name, (steps, values) in curves.items():
        colour = sheet.COLOURS.get(name.partition("_")[2]) or next(spare)  # of think or pred boxes
        window = 1 if name in COLUMNS else page.WINDOW
        values = np.round(values, 9)  # a loss of 1e-17 is 0
        means = [np.mean(values[max(0, k + 1 - window) : k + 1]) for k in range(len(values))]
        dots = "o" if window == 1 or len(steps) == 1 else ""  # a single point makes no line
        thin = {"alpha": 0.35, "linewidth": 0.8, "marker": dots, "markersize": 4}
        axes.plot(steps, values, color=colour, **thin)
        axes.plot(steps, means, color=colour, label=name.rpartition("/")[2], linewidth=1.8)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style(axes, title)
    if len(curves) > 1:  # below the axes, where it covers no curve
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.09), "ncols": legend_columns(curves)}
        axes.legend(**place, frameon=False, fontsize=9, columnspacing=1)


def style(axes: Axes, title: str) -> None:
    title = title if len(title) < 45 else f"...{title[-42:]}"
    axes.set_title(title, fontsize=11, parse_math=False)  # a reward of your own may be called anything
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        return print(__doc__.strip())
    for run in arguments:
        print(*draw_run(Path(run)), sep="\n")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
