"""The page of a run, RUN/pictures/run.html (a part of lab.pictures): what it shows; page.html is how."""

import base64
import io
import itertools
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from config import Config
from data import load_samples
from lab import sheet
from lab.sheet import Card, Evaluations, ShownAnswer
from metrics import COLUMNS, format_gain, think_gain
from runtime.files import DataError, read_jsonl
from runtime.logs import count_warnings, final_warnings
from samples import QUESTION_TYPES, Sample

SENTENCES = 8  # held-out ones shown, at most
PARTS = (
    "warnings",
    "unread",
    "progress",
    "printed",
    "explained",
    "score_rows",
    "parts",
    "settings",
    "figures",
    "gains",
    "prompts",
    "cards",
    "answer_table",
)
TIMES = 5  # training steps at which sampled answers are shown, at most
WINDOW = 10  # optimiser steps that a curve averages over
HOW_TO_READ = f"over optimiser steps: thin lines are single steps, thick ones the mean of the last {WINDOW}"


def render(
    run: Path,
    config: Config,
    metrics: list[dict],
    figures: dict[str, Figure],
    evaluations: Evaluations,
    samples: dict[str, Sample],
    cards: list[Card],
) -> tuple[str, str]:
    """Return the page as HTML, and a line that says which clips cannot be read, if there are any.

    metrics: lines of metrics.jsonl. figures: by title. evaluations: name -> id -> answer. samples: id ->
    held-out sentence. cards: the held-out sentences to show. Raises DataError for a record of watched.jsonl
    that cannot be used.
    """
    prompts = read_prompts(run / "watched.jsonl", config)
    unread = unread_note([*(card for card, _ in prompts), *cards])
    gains = {}
    for name, answers in evaluations.items() if config.think else ():
        gains[name] = think_gain([a.record for a in answers.values()], list(samples.values()), config)
    text = fill(
        f"{run.resolve().name}: a run of STVG-o1",
        warnings=warnings(metrics),
        progress=progress(run, config, metrics),
        unread=unread,
        score_rows=score_rows(metrics),
        score_heads=("held-out (%)", *COLUMNS, "N", "failed"),
        settings=(run / "config.yaml").read_text(encoding="utf-8"),
        how_to_read=HOW_TO_READ,
        figures=figures,
        gains={name: format_gain(gain) for name, gain in gains.items() if gain},
        prompts=prompts,
        cards_are="Held-out answers, from the worst to the best",
        cards=cards,
        answer_table=answer_table(evaluations, samples),
    )
    return text, unread


def fill(title: str, **parts) -> str:
    """page.html with these of its PARTS, and what they need."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}  # sentences and answers are text
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
    environment.filters |= {"svg": svg_uri, "jpeg": jpeg_uri, "decimals": sheet.decimals}
    parts = dict.fromkeys(PARTS, ()) | parts
    return environment.get_template("page.html").render(title=title, colours=sheet.COLOURS, **parts)


def unread_note(cards: list[Card]) -> str:
    """Which clips cannot be read, if there are any."""
    clips = [card.clip for card in cards]
    errors = [clip.error for clip in clips if clip.error]
    words = f"{len(errors)} of the {len(clips)} clips shown cannot be read, and their frames are grey"
    return f"{words}; the first: {errors[0]}" if errors else ""


def warnings(metrics: list[dict]) -> list[str]:
    """What train.py warns of at its end, of the steps so far."""
    lines = [line for line in metrics if line["phase"] == "grpo"]
    return final_warnings(count_warnings(lines), len(lines))


def progress(run: Path, config: Config, metrics: list[dict]) -> str:
    """Say how far the run has come, and how the reward has changed."""
    lines = {phase: [line for line in metrics if line["phase"] == phase] for phase in ("sft", "grpo")}
    parts = []
    for phase, planned in (("sft", config.sft.steps), ("grpo", config.steps)):
        if planned:
            parts.append(f"{lines[phase][-1]['step'] if lines[phase] else 0} of {planned} {phase} steps")
    parts.append("finished" if (run / "summary.json").is_file() else "under way or stopped")
    text = f"{config.model} on {config.train_annotations}: {', '.join(parts)}."
    if rewards := [line["reward"] for line in lines["grpo"]]:
        few = max(1, len(rewards) // 10)  # as in summary.json
        first, last = (sheet.decimals(np.mean(part)) for part in (rewards[:few], rewards[-few:]))
        text += f" Mean reward in the first and in the last tenth of the steps: {first} → {last}."
    return text


def score_rows(metrics: list[dict]) -> list[list]:
    """The rows of the table of held-out scores: each evaluation, and its types of questions."""
    rows = []
    for line in metrics:
        if line["phase"] == "eval":
            parts = {"": line} | {f", {kind}": line[kind] for kind in QUESTION_TYPES if kind in line}
            for kind, row in parts.items():
                cells = [float(row[name]) for name in COLUMNS]
                rows.append([f"step {line['step']}{kind}", *cells, row["N"], row["failures"]])
    return rows


def answer_table(evaluations: Evaluations, samples: dict[str, Sample]) -> tuple[list[str], list[list]]:
    """The heads and rows of the table of all held-out sentences, from the worst to the best: their scores in
    the first and the last evaluation."""
    chosen, heads, rows = sheet.evenly(list(evaluations.items()), 2), ["id", "sentence"], []
    for name, answers in chosen:
        heads += [f"{score} {name}" for score in next(iter(answers.values())).scores]
    last = chosen[-1][1] if chosen else {}
    for key in sorted(last, key=lambda key: last[key].scores["reward"]):
        scores = [answers[key].scores.values() if key in answers else ("", "", "") for _, answers in chosen]
        rows.append([key, samples[key].sentence, *itertools.chain(*scores)])
    return heads, rows


def load_by_id(annotations: str, config: Config) -> dict[str, Sample]:
    """id -> sentence of a split. Raises DataError."""
    samples, _ = load_samples(config.dataset, annotations, config.videos, config.vidor)
    return {sample.id: sample for sample in samples}


def choose_cards(evaluations: Evaluations, samples: dict[str, Sample], config: Config) -> list[Card]:
    """Choose SENTENCES held-out sentences, evenly from the worst to the best reward of the last answers."""
    last, cards = list(evaluations.values())[-1] if evaluations else {}, []
    for key in sheet.evenly(sorted(last, key=lambda key: last[key].scores["reward"]), SENTENCES):
        clip = sheet.read_shown_clip(samples[key], config.text_format.step_seconds)
        cards.append(
            Card(samples[key].sentence, key, clip, [e[key] for e in evaluations.values() if key in e])
        )
    return cards


def read_prompts(path: Path, config: Config) -> list[tuple[Card, dict[int, list[ShownAnswer]]]]:
    """Read watched.jsonl, if it is there: the answers sampled to a few prompts along the training.

    Returns for each prompt a card and: step -> answers, from the best to the worst, at TIMES of the steps at
    most. Raises DataError.
    """
    prompts, groups = [], {}
    keys = "step", "id", "completion", "truth", "scale", "rewards"
    for record in read_jsonl(path, *keys, skip_cut=True) if path.is_file() else ():
        groups.setdefault(record["id"], {}).setdefault(record["step"], []).append(record)
    samples = load_by_id(config.train_annotations, config) if groups else {}
    for key, group in groups.items():
        if key not in samples:
            raise DataError(f"{path}: {key!r} is no sentence of {config.train_annotations}")
        shown = {}
        for step in sheet.evenly(list(group), TIMES):
            ranked = sorted(group[step], key=lambda record: -record["rewards"]["total"])
            scores = [{"reward": record["rewards"]["total"]} for record in ranked]
            shown[step] = [sheet.show_answer(r, "", s, config) for r, s in zip(ranked, scores, strict=True)]
        clip = sheet.read_shown_clip(samples[key], config.text_format.step_seconds)
        prompts.append((Card(samples[key].sentence, key, clip, []), shown))
    return prompts


def svg_uri(figure: Figure) -> str:
    """A figure as a data URI."""
    sheet.save(figure, file := io.BytesIO(), format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def jpeg_uri(clip: sheet.Clip) -> str:
    """The frames of a clip side by side, as a data URI."""
    Image.fromarray(np.concatenate([*clip.frames], axis=1)).save(file := io.BytesIO(), "jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
