"""Pictures of a run: the curves of its training, its answers on the frames, and a page with all of it.

    python -m lab.pictures RUN [RUN ...]

    RUN/pictures/run.html       scores, curves, what some prompts were answered along the training, all held-out
                                answers: one file, to be opened in a browser
    RUN/pictures/curves.png     the curves of metrics.jsonl (README, "Glossary")
    RUN/pictures/area.png       vIoU of think and pred boxes by the size of the subject (STVG-o1, Fig. 4)
    RUN/pictures/answers.png    held-out answers from the worst to the best, before and after training: truth
                                green, think boxes blue, pred boxes red (STVG-o1, Fig. 3)

Reads what train.py wrote (metrics.jsonl, rollouts.jsonl, predictions*.jsonl, config.yaml) and the videos; the
frames of those that have gone are grey. Rewards are those that the files hold. Needs matplotlib.
"""

import io
import re
import sys
from pathlib import Path

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # used directly: no window, no global state as with pyplot
except ImportError:
    if __name__ == "__main__":
        sys.exit("error: pictures need matplotlib: pip install -r requirements-dev.txt")
    raise

from config import Config, load_config
from lab import page
from lab.sheet import COLOURS, DPI, Card, ShownAnswer, draw_sheet, evenly, read_shown_clip, show_answer
from metrics import COLUMNS, native_scores, tube_of, viou_by_area
from rewards import TERMS, plugins
from runtime.files import DataError, read_jsonl, run_script, write_whole
from samples import Sample

SENTENCES, EVALUATIONS = 8, 5  # shown at most


def draw_run(run: Path) -> list[Path]:
    """Draw a run folder of train.py, also while it is still training (with what there is).

    Returns the paths of the page and the pictures. Names videos that cannot be read on stderr. Raises
    DataError where the folder is no run or a record cannot be used, OSError where a picture cannot be written.
    """
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: is no run (no {', '.join(missing)}); name an output_dir of train.py")
    config, name = load_config(run / "config.yaml"), run.resolve().name
    metrics = read_jsonl(run / "metrics.jsonl", "phase", "step", skip_cut=True)
    panels = panels_of(metrics, config)
    figures = {"curves.png": draw_curves(panels, metrics, name)}
    evaluations, cards, samples = {}, [], {}
    if any(run.glob("predictions*.jsonl")):
        samples = page.load_by_id(config.eval_annotations, config)
        evaluations = read_evaluations(run, samples, config)
    if evaluations:
        *_, last = evaluations.values()
        ranked = sorted(last, key=lambda key: last[key].scores["reward"])
        for key in evenly(ranked, SENTENCES):
            clip = read_shown_clip(samples[key], config.text_format.step_seconds)
            cards.append(Card(samples[key], clip, [e[key] for e in evaluations.values() if key in e]))
        figures["area.png"] = draw_areas(last, samples, config)
        figures["answers.png"] = draw_sheet(f"{name}: held-out answers, worst to best of {len(last)}", cards)
    alone = {title: draw_curves({title: curves}, metrics) for title, curves in panels.items()}
    if evaluations:
        alone["Held-out vIoU by size of the subject"] = figures["area.png"]
    text, unread = page.render(run, config, metrics, alone, evaluations, samples, cards)
    paths = [run / "pictures" / file for file in ("run.html", *figures)]
    for path, figure in zip(paths[1:], figures.values(), strict=True):
        save_figure(figure, path)
    write_whole(paths[0], text.encode(errors="replace"))
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
# Held-out answers


def read_evaluations(run: Path, samples: dict[str, Sample], config: Config) -> dict[str, dict[str, ShownAnswer]]:
    """Read the answers that train.py left in a run: "BEFORE", "STEP 20", ..., "AFTER" -> id -> answer.

    At most EVALUATIONS of them, evenly. Sentences whose videos could not be read are left out. Raises
    DataError for an answer to another sentence.
    """
    names = {}
    for path in run.glob("predictions*.jsonl"):
        if match := re.fullmatch(r"predictions(_before|_(\d+)|)", path.stem):
            step = int(match[2]) if match[2] else -1 if match[1] else sys.maxsize
            names[step] = {-1: "BEFORE", sys.maxsize: "AFTER"}.get(step, f"STEP {step}"), path
    evaluations = {}
    for _, (name, path) in evenly(sorted(names.items()), EVALUATIONS):
        answers = evaluations[name] = {}
        for record in read_jsonl(path, "id", "completion", "truth", "scale", "rewards"):
            sample = page.find(samples, record["id"], path, config.eval_annotations)
            if "unreadable" not in record:
                native = native_scores(tube_of(record, sample, config), sample)
                scores = {"reward": record["rewards"]["total"], "tIoU": native["tIoU"], "vIoU": native["vIoU"]}
                answers[sample.id] = show_answer(record, name, scores, config)
    return {name: answers for name, answers in evaluations.items() if answers}


def draw_areas(answers: dict[str, ShownAnswer], samples: dict[str, Sample], config: Config) -> Figure:
    """Draw the mean vIoU of think and pred boxes by the share of the frame that the subject takes (STVG-o1,
    Fig. 4)."""
    asked, scores = [samples[key] for key in answers], {}
    for name in ("think", "pred") if config.think else ("pred",):
        tubes = [tube_of(answer.record, samples[key], config, name) for key, answer in answers.items()]
        scores[name] = [native_scores(tube, sample) for tube, sample in zip(tubes, asked, strict=True)]
    bins = viou_by_area(asked, scores)
    filled = [k for k, row in enumerate(bins) if row["N"]]
    bins = bins[filled[0] : filled[-1] + 1]  # without the empty ones at both ends
    figure = Figure(figsize=(2.5 + 0.8 * len(bins), 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(title="Held-out vIoU by size of the subject")
    width = 0.8 / len(scores)
    for k, name in enumerate(scores):
        places = np.arange(len(bins)) + (k + 0.5) * width - 0.4
        heights = [row[name] or 0 for row in bins]
        axes.bar(places, heights, width, color=COLOURS[name], label=f"{name} boxes")
    labels = [f"{100 * row['low']:g}-{100 * row['high']:g}\nN = {row['N']}" for row in bins]
    axes.set_xticks(range(len(bins)), labels)
    axes.set(xlabel="true boxes / frame, by area (%)\nN: sentences", ylabel="mean vIoU (%)")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    return figure


# ----------------------------------------------------------------------------------------------------------
# Curves

SHARES = ("span_ratio", "one_step", "invalid_boxes", "out_of_frame", "copied", "truncated", "zero_spread")
PARTS = ("step", "decode", "rollout", "score", "reference", "update", "wait")
PANELS = {  # title -> phase and keys of lines of metrics.jsonl
    "Reward of sampled answers": ("grpo", ("reward",)),
    "Reward terms, unweighted": ("grpo", TERMS),
    "Held-out split, greedy answers (%)": ("eval", COLUMNS),
    "IoU of sampled answers, on steps": ("grpo", ("overlap", "viou_think", "viou_pred")),
    "KL to the reference": ("grpo", ("kl",)),
    "Loss and gradient norm": ("grpo", ("loss", "grad_norm")),
    "Tokens of an answer": ("grpo", ("length",)),
    "Diagnostics of sampled answers": ("grpo", SHARES),
    "Seconds of a step": ("grpo", tuple(f"seconds/{part}" for part in PARTS)),
    "Loss of supervised fine-tuning": ("sft", ("loss",)),
}
ABOUT_THINK = {"spatial_think", "think", "viou_think", "copied"}
COLOUR_OF = {"spatial_think": COLOURS["think"], "viou_think": COLOURS["think"]}
COLOUR_OF |= {"spatial_pred": COLOURS["pred"], "viou_pred": COLOURS["pred"]}
CYCLE = ("black", "#e69f00", "#7a3fb0", "#00a3a3", "#d6579b", "#8c5a2b", "#8a8f95")

Curves = dict[str, tuple[list[int], list[float]]]  # name -> optimiser steps, values


def panels_of(metrics: list[dict], config: Config) -> dict[str, Curves]:
    """Collect the curves of each panel, title -> curves; a reward of your own has a panel to itself."""
    flat = [line | {f"seconds/{k}": v for k, v in line.get("seconds", {}).items()} for line in metrics]
    own = {f"Your reward {name}": ("grpo", (name,)) for name in plugins(config.rewards)}
    panels = {}
    for title, (phase, names) in (PANELS | own).items():
        panels[title] = {}
        for name in names if config.think else set(names) - ABOUT_THINK:
            lines = [line for line in flat if line["phase"] == phase and name in line]
            if lines:
                panels[title][name] = [line["step"] for line in lines], [line[name] for line in lines]
    return {title: curves for title, curves in panels.items() if curves}


def draw_curves(panels: dict[str, Curves], metrics: list[dict], title: str = "") -> Figure:
    """Draw one panel by itself, or all of them as a sheet with a title. Steps where the reward rises and vIoU
    falls ("drift") are shaded in the panel of the reward."""
    columns = 3 if title else 1
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5 * columns, 3.8 * rows), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(f"{title}  ({page.HOW_TO_READ})", fontsize=13)
    for k, (name, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, k + 1)
        draw_panel(axes, name, curves)
        if "reward" in curves:
            for line in metrics:
                if line.get("drift"):
                    axes.axvspan(line["step"] - 0.5, line["step"] + 0.5, color="#ffdf9e", linewidth=0)
    return figure


def draw_panel(axes: Axes, title: str, curves: Curves) -> None:
    """Draw the values as faint dots and their trailing mean as a line; the few of evaluations are joined."""
    axes.set_title(title if len(title) < 45 else f"...{title[-42:]}", fontsize=11, parse_math=False)
    spare = iter(CYCLE)
    for name, (steps, values) in curves.items():
        colour = COLOUR_OF.get(name) or next(spare)
        style = {"color": colour, "label": name.rpartition("/")[2]}
        if name in COLUMNS:
            axes.plot(steps, values, "o-", **style)
            axes.set_ylim(0, 100)
            continue
        means = [np.mean(values[max(0, k + 1 - page.WINDOW) : k + 1]) for k in range(len(values))]
        axes.plot(steps, values, ".", color=colour, alpha=0.3, markersize=4)
        axes.plot(steps, means, linewidth=1.8, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:  # below the axes, where it covers no curve
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08)}
        axes.legend(**place, ncols=4 if len(curves) == 4 else 3, frameon=False, fontsize=9, columnspacing=1)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__.strip())
    for run in arguments:
        print(*draw_run(Path(run)), sep="\n")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output", "free some space, or make the folder writable")
