"""Pictures of a run: the curves of its training, its answers on the frames, and a page with all of it.

    python visualize.py runs/toy

    RUN/pictures/run.html       all of the following, what some prompts were answered along the way, and the
                                held-out answers of each evaluation: one file, to be opened in a browser
    RUN/pictures/curves.png     the curves of metrics.jsonl (README, "Glossary")
    RUN/pictures/area.png       vIoU of think and pred boxes by the size of the subject (STVG-o1, Fig. 4)
    RUN/pictures/answers.png    held-out answers from the worst to the best, before and after training: truth
                                green, think boxes blue, pred boxes red (STVG-o1, Fig. 3)

Reads what train.py wrote (metrics.jsonl, rollouts.jsonl, predictions*.jsonl, config.yaml) and the videos; the
frames of those that have gone are grey. Rewards are those that the files hold. Needs matplotlib.
"""

import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
except ImportError:
    sys.exit("error: visualize.py needs matplotlib: pip install -r requirements-dev.txt")

from config import load_config
from lab import report
from lab.page import COLOURS, hexadecimal
from lab.sheet import DPI, draw_sheet, held_out
from rewards import TERMS
from runtime.files import DataError, read_jsonl, run_script, write_whole
from runtime.logs import PARTS, flatten

WINDOW = 10  # steps that a curve averages over
POINTS = 500  # of a curve at most; a longer run shows every second step, or third, ...
DESCRIPTION = f"lines: mean of the last {WINDOW} steps, bands: their standard deviation"


def draw_run(run: Path) -> list[Path]:
    """Draw a run folder of train.py, also while it is still training (with what there is).

    Returns the paths of the page and the pictures. Videos that cannot be read are said on stderr, once for
    all. Raises DataError where the folder is no run or a record cannot be read; but a last line that is cut,
    by the end of a killed run, is left out. OSError where a picture cannot be written.
    """
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: is no run (no {', '.join(missing)}); name an output_dir of train.py")
    config, name = load_config(run / "config.yaml"), run.resolve().name
    metrics = read_jsonl(run / "metrics.jsonl", "phase", "step", skip_cut=True)
    panels = panels_of(metrics, config.think)
    figures = {"curves.png": draw_curves(panels, name)}
    single = [draw_panel_alone(panel) for panel in panels]
    evaluations, known = report.find_evaluations(run), {}
    if evaluations:
        known = held_out(config)
        evaluations = report.read_evaluations(evaluations, known, config)
        figures["area.png"] = draw_areas(report.areas(evaluations[-1], known, config))
        if evaluations[-1].name == "AFTER":
            before = evaluations[0].answers if evaluations[0].name == "BEFORE" else {}
            figures["answers.png"] = draw_sheet(name, known, before, evaluations[-1].answers, config)
    page, unread = report.write_page(
        run, config, metrics, (DESCRIPTION, single), figures.get("area.png"), known, evaluations
    )
    paths = [run / "pictures" / file for file in ("run.html", *figures)]
    for path, figure in zip(paths[1:], figures.values(), strict=True):
        save_figure(figure, path)
    write_whole(paths[0], page.encode())
    if unread:
        print(unread, file=sys.stderr)
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file whole or not at all; its folder is made. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    write_whole(path, picture.getvalue())


# ----------------------------------------------------------------------------------------------------------
# Curves

BLUE, RED, PURPLE, ORANGE, TEAL, GREY = "#1e5aff", "#e11414", "#7a3fb0", "#e69f00", "#00a3a3", "#8a8f95"
PINK, BROWN, GREEN = "#d6579b", "#8c5a2b", "#3c9a3c"
# Where a curve has none of these, the first of OTHERS that its panel does not use.
CURVE_COLOURS = {"reward": "black", "reward_std": "black", "format": GREY, "consistency": ORANGE}
CURVE_COLOURS |= {"temporal": PURPLE, "think": TEAL, "spatial_think": BLUE, "spatial_pred": RED}
CURVE_COLOURS |= {"tiou": PURPLE, "viou_think": BLUE, "viou_pred": RED}
CURVE_COLOURS |= dict.fromkeys(("kl", "think_gap", "span_ratio", "length", "loss", "1 - format"), "black")
CURVE_COLOURS |= {"m_tIoU": PURPLE, "m_vIoU": RED, "vIoU@0.3": ORANGE, "vIoU@0.5": TEAL}
OTHERS = (BLUE, ORANGE, TEAL, PINK, BROWN, GREEN, GREY, PURPLE, RED, "black")
DRIFT = "#ffdf9e"
LABEL = 26  # letters of a name at most


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    title: str
    kind: str  # "steps": means and bands | "eval": points | "stack": one upon another
    curves: dict[str, tuple[list[int], list[float]]]  # name -> optimiser steps, values
    drift: tuple[int, ...] = ()  # steps to shade, where the reward rises and vIoU falls


def panels_of(metrics: list[dict], think: bool = True) -> list[Panel]:
    """What the lines of metrics.jsonl have to show. think: False leaves out what is about thinking boxes."""
    terms = list(dict.fromkeys(name for line in metrics for name in line.get("std", ()))) or list(TERMS)
    shares = ("1 - format", "1 - overlap", "one_step", "invalid_boxes", "out_of_frame", "copied", "truncated")
    scores = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
    layout = (
        ("Reward of sampled answers", "grpo", ("reward",)),
        ("Reward terms, unweighted", "grpo", terms),
        (
            "Spread within a group: reward and terms",
            "grpo",
            ("reward_std", *(f"std/{term}" for term in terms)),
        ),
        ("IoU of sampled answers, on steps", "grpo", ("tiou", "viou_think", "viou_pred")),
        ("Held-out split, greedy answers (%)", "eval", scores),
        ("KL to the reference", "grpo", ("kl",)),
        ("Spatial reward, pred boxes - think boxes", "grpo", ("think_gap",)),
        ("Shares to watch", "grpo", (*shares, "zero_spread")),
        ("Steps of the answer / steps of the truth", "grpo", ("span_ratio",)),
        ("Tokens of an answer", "grpo", ("length",)),
        ("Loss of supervised fine-tuning", "sft", ("loss",)),
        ("Seconds of a step", "grpo", tuple(f"seconds/{part}" for part in PARTS)),
    )
    about_think = {"spatial_think", "think", "viou_think", "think_gap", "copied"}
    drift = tuple(line["step"] for line in metrics if line.get("drift"))
    flat = [{"phase": line["phase"], **flatten(line)} for line in metrics]
    panels = []
    for title, phase, names in layout:
        names = [name for name in names if think or name.removeprefix("std/") not in about_think]
        curves = {name: curve(flat, phase, name) for name in names}
        curves = {name: points for name, points in curves.items() if points[0]}
        kind = "eval" if phase == "eval" else "stack" if title.startswith("Seconds") else "steps"
        if curves:
            panels.append(Panel(title, kind, curves, drift if names == ["reward"] else ()))
    return panels


def curve(lines: list[dict], phase: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, from the lines of one phase that have it; of "1 - NAME" what is left."""
    key = name.removeprefix("1 - ")
    lines = [line for line in lines if line["phase"] == phase and key in line]
    values = [line[key] if key == name else 1 - line[key] for line in lines]
    return [line["step"] for line in lines], values


def trailing(values: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """At each place mean and standard deviation of the last `window` values, of fewer at the beginning."""
    padded = np.concatenate([np.full(window - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)  # (T, window)
    return np.nanmean(windows, axis=1), np.nanstd(windows, axis=1)


def smooth(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is drawn of a curve: at most POINTS steps, the last one among them, with mean and spread."""
    stride = max(1, -(-len(steps) // POINTS))
    return tuple(numbers[::-stride][::-1] for numbers in (np.array(steps), *trailing(values, WINDOW)))


def draw_curves(panels: list[Panel], title: str) -> Figure:
    """All panels on one sheet."""
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(15, 4 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}  ({DESCRIPTION})", fontsize=13)
    for k, panel in enumerate(panels):
        draw_panel(figure.add_subplot(rows, 3, k + 1), panel)
    return figure


def draw_panel_alone(panel: Panel) -> Figure:
    """For the page, where it is about as wide as here or a little less."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    with rc_context({"font.size": 10}):
        draw_panel(figure.add_subplot(), panel)
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("optimiser step")
    colours = _colours(panel.curves)
    lines = {}
    for first, last in runs_of(panel.drift):
        lines["reward rises, vIoU falls"] = axes.axvspan(first - 0.5, last + 0.5, color=DRIFT, linewidth=0)
    if panel.kind == "stack":
        smoothed = [smooth(*points) for points in panel.curves.values()]
        steps, means = smoothed[0][0], [mean for _, mean, _ in smoothed]
        layers = axes.stackplot(steps, means, colors=list(colours.values()), linewidth=0)
        lines |= dict(zip(panel.curves, layers, strict=True))
    for name, points in panel.curves.items() if panel.kind != "stack" else ():
        if panel.kind == "eval":
            (lines[name],) = axes.plot(*points, "o-", color=colours[name])
            continue
        steps, mean, spread = smooth(*points)
        band = {"color": colours[name], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(steps, mean - spread, mean + spread, **band)
        (lines[name],) = axes.plot(steps, mean, color=colours[name], linewidth=1.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.kind == "eval":
        axes.set_ylim(0, 100)
    if len(lines) > 1:  # below the axes, where it covers no curve
        names = [label(name) for name in lines]
        columns = 2 if max(map(len, names)) > 14 or len(names) in (2, 4) else 3
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": columns}
        found = axes.legend(lines.values(), names, **place, frameon=False, fontsize=10, columnspacing=1.2)
        for text in found.get_texts():
            text.set_parse_math(False)  # a reward of one's own may be called anything


def label(name: str) -> str:
    """A metric in a legend, which has room for two of them: without its group or its file's folder."""
    name = name.rpartition("/")[2]
    return name if len(name) <= LABEL else f"...{name[3 - LABEL :]}"


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each curve of a panel."""
    known = {name: CURVE_COLOURS.get(name.removeprefix("std/")) for name in names}
    spare = [colour for colour in OTHERS if colour not in known.values()]
    rest = [name for name, colour in known.items() if colour is None]
    return known | {name: spare[k % len(spare)] for k, name in enumerate(rest)}


def runs_of(steps: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers, which ascend."""
    runs = [[step for _, step in run] for _, run in groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]


# ----------------------------------------------------------------------------------------------------------
# STVG-o1, Fig. 4


def draw_areas(bins: list[dict]) -> Figure:
    """Mean vIoU of the think and of the pred boxes by the share of the frame that the subject takes (STVG-o1,
    Fig. 4).

    bins: of metrics.viou_by_area, with "pred" and maybe "think"."""
    filled = [k for k, row in enumerate(bins) if row["N"]]
    bins = bins[filled[0] : filled[-1] + 1]  # without the empty ones at both ends
    figure = Figure(figsize=(2.5 + 0.7 * len(bins), 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(title="Held-out vIoU by size of the subject")
    names = [name for name in ("think", "pred") if name in bins[0]]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        places = np.arange(len(bins)) + (k + 0.5) * width - 0.4
        colour = hexadecimal(COLOURS[name])
        axes.bar(places, [row[name] or 0 for row in bins], width, color=colour, label=f"{name} boxes")
    axes.set_xticks(range(len(bins)), [f"{row['low']:g}-\n{row['high']:g}\nN = {row['N']}" for row in bins])
    axes.set_xlabel("true boxes / frame, by area\n(N: sentences)")
    axes.set_ylabel("mean vIoU (%)")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    return figure


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
