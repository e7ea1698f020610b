"""The page of a run, RUN/pictures/run.html (`python visualize.py RUN`): its scores, settings and curves, the
answers to some prompts along the training, and the held-out answers of its evaluations."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure

from config import Config
from data import load_samples
from lab import page
from lab.bench import read_truth
from lab.sheet import Answered, by_reward, fit, read_answers, shown_frames
from metrics import COLUMNS, native_scores, think_gain, tube_from_answer, viou_by_area
from prompts import Answer, parse_answer
from runtime.files import DataError
from runtime.predictions import read_predictions
from samples import QUESTION_TYPES, Sample, Truth

PROMPTS, TIMES = 3, 4  # prompts whose sampled answers are shown, and training steps of each, at most
EVALUATIONS = 5  # shown at most: the first, the last and some between
EACH = 4  # worst, median and best answers of an evaluation


@dataclass
class Evaluation:
    """The answers to the held-out split at one moment of the training."""

    name: str  # "BEFORE", "STEP 20", "AFTER"
    path: Path
    answers: dict[str, Answered]  # id -> answer
    gain: dict | None  # of evaluate.think_gain


@dataclass
class Clip:
    """What page.tubes needs of a clip's frames."""

    steps: list[int]
    aspect: float  # width / height
    strip: str  # name of the strip

    @property
    def width(self) -> int:
        """Pixels that its frames take on the page."""
        return page.row_width(len(self.steps), self.aspect)


def write_page(
    run: Path,
    config: Config,
    metrics: list[dict],
    curves: tuple[str, list[Figure]],
    by_area: Figure | None,
    known: dict[str, Sample],
    evaluations: list[Evaluation],
) -> tuple[str, str]:
    """The page as HTML, and a line that says which videos cannot be read, if there are any; it stands on the
    page, too.

    metrics: lines of metrics.jsonl. curves: how to read the figures of these numbers, and the figures.
    by_area: that of the last evaluation (areas). known: id -> held-out sentence. Raises DataError.
    """
    groups = sampled_groups(run / "rollouts.jsonl")
    trained = {}
    if groups:
        samples, _ = load_samples(config.dataset, config.train_annotations, config.videos, config.vidor)
        trained = {sample.id: sample for sample in samples}
        unknown = [key for key in groups if key not in trained]
        if unknown:
            where = run / "rollouts.jsonl"
            raise DataError(f"{where}: {unknown[0]!r} is no sentence of {config.train_annotations}")
    chosen = {evaluation.name: extremes(by_reward(evaluation.answers)) for evaluation in evaluations}
    shown = [trained[key] for key in groups]
    shown += [known[key] for parts in chosen.values() for keys in parts.values() for key in keys]
    clips, strips, faults = read_clips(shown, config)
    count = f"{len(faults)} of the {len(clips)} clips shown cannot be read"
    unread = f"{count}, and their frames are grey; the first: {faults[0]}" if faults else ""
    parts = [
        *strips,
        *([page.paragraph(unread)] if unread else []),
        *head(config, metrics, (run / "summary.json").is_file()),
        page.section(
            "Curves",
            page.paragraph(f"{curves[0].capitalize()}."),
            page.grid(*map(page.figure_svg, curves[1])),
        ),
    ]
    if by_area is not None:
        parts.append(
            page.section(
                "The boxes",
                gains(evaluations),
                page.wide(page.figure_svg(by_area), round(80 * by_area.get_figwidth())),
            )
        )
    if groups:
        parts.append(draw_prompts(groups, trained, clips, config))
    if evaluations:
        parts.append(draw_evaluations(evaluations, chosen, known, clips, config))
    return page.document(f"{run.resolve().name}: a run of STVG-o1", "\n".join(parts)), unread


# ----------------------------------------------------------------------------------------------------------
# What is read


def find_evaluations(run: Path) -> list[tuple[str, Path]]:
    """(name, file) of the held-out answers that train.py has left in a run: before, along the way, after."""
    numbered = [
        (re.fullmatch(r"predictions_(\d+)", path.stem), path) for path in run.glob("predictions_*.jsonl")
    ]
    steps = sorted((int(match[1]), path) for match, path in numbered if match)
    before, after = run / "predictions_before.jsonl", run / "predictions.jsonl"
    found = [("BEFORE", before), *((f"STEP {step}", path) for step, path in steps), ("AFTER", after)]
    found = [(name, path) for name, path in found if path.is_file()]
    places = np.linspace(0, len(found) - 1, min(len(found), EVALUATIONS)).round().astype(int)
    return [found[place] for place in places]


def read_evaluations(
    found: list[tuple[str, Path]], known: dict[str, Sample], config: Config
) -> list[Evaluation]:
    """Their answers. Raises DataError."""
    evaluations = []
    for name, path in found:
        answers, samples = read_answers(path, name, known, config), list(known.values())
        gain = think_gain(read_predictions(path), samples, config) if config.think else None
        evaluations.append(Evaluation(name, path, answers, gain))
    return evaluations


def areas(evaluation: Evaluation, known: dict[str, Sample], config: Config) -> list[dict]:
    """metrics.viou_by_area of an evaluation."""
    samples = [known[key] for key in evaluation.answers]
    scores = {"pred": [given.native for given in evaluation.answers.values()]}
    if config.think:
        scores["think"] = []
        for sample, given in zip(samples, evaluation.answers.values(), strict=True):
            tube = tube_from_answer(given.answer, sample, config.text_format, given.scale, "think")
            scores["think"].append(native_scores(tube, sample))
    return viou_by_area(samples, scores)


def sampled_groups(path: Path) -> dict[str, dict[int, list[dict]]]:
    """id -> step -> the records of its sampled answers, of the PROMPTS prompts that were sampled at the most
    steps, the earlier ones first, at TIMES of these steps. "truth" in them is a Truth: what they were judged
    by, which ends where the video does.

    The file grows to gigabytes, so it is read line by line, and of all but these only the place is kept. A
    last line that is cut is left out. Raises DataError for another that is no record.
    """
    keys = {"id", "step", "completion", "truth", "scale", "rewards", "advantage"}
    places: dict[str, dict[int, list[int]]] = {}
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                places.setdefault(record["id"], {}).setdefault(record["step"], []).append(place)
                if not record.keys() >= keys:
                    raise KeyError
            except (ValueError, TypeError, KeyError):
                names = ", ".join(f'"{key}"' for key in sorted(keys))
                raise DataError(
                    f"{path}, line {number}: is no JSON object with {names}; correct or remove it"
                ) from None
            place += len(line)
        groups = {}
        for key in sorted(places, key=lambda key: -len(places[key]))[:PROMPTS]:
            steps = sorted(places[key])
            some = np.linspace(0, len(steps) - 1, min(len(steps), TIMES)).round().astype(int)
            groups[key] = {steps[k]: read_group(file, path, places[key][steps[k]]) for k in some}
    return groups


def read_group(file: BinaryIO, path: Path, places: list[int]) -> list[dict]:
    """The records that begin at these bytes of a file. Raises DataError where a truth is none."""
    records = []
    for place in places:
        file.seek(place)
        record = json.loads(file.readline())
        try:
            records.append(record | {"truth": read_truth(record["truth"])})
        except ValueError as error:
            where = f"{path}: {record['id']!r} at step {record['step']}"
            raise DataError(f"{where}: {error}") from error
    return records


def read_clips(samples: list[Sample], config: Config) -> tuple[dict[str, Clip], list[str], list[str]]:
    """name_of -> clip, their strips as HTML, and what is wrong with those that cannot be read."""
    clips, strips, faults = {}, [], []
    for name, sample in {name_of(sample): sample for sample in samples}.items():
        steps, frames, fault = shown_frames(sample, config.text_format.step_seconds)
        faults += [fault] if fault else []
        frames = np.stack([fit(frame, 2 * page.SIDE) for frame in frames])  # screens have fine pixels
        strips.append(page.strip(name, frames))
        clips[name] = Clip(steps, frames.shape[2] / frames.shape[1], name)
    return clips, strips, faults


def name_of(sample: Sample) -> str:
    """Of a sample's clip, which other sentences may share. (An id may stand in both splits.)"""
    return f"{sample.video}, {sample.num_frames} frames from {sample.begin_frame}"


def extremes(ranked: list[str]) -> dict[str, list[str]]:
    """EACH of the worst, the median and the best; none twice."""
    middle = max(EACH, len(ranked) // 2 - EACH // 2)
    worst, median = ranked[:EACH], ranked[middle : middle + EACH]
    best = [key for key in ranked[-EACH:] if key not in worst + median]
    return {name: keys for name, keys in (("Worst", worst), ("Median", median), ("Best", best)) if keys}


# ----------------------------------------------------------------------------------------------------------
# What is shown


def head(config: Config, metrics: list[dict], finished: bool) -> list[str]:
    """Scores before and after, reward, and the settings that are not the defaults."""
    taught, steps = ([line for line in metrics if line["phase"] == phase] for phase in ("sft", "grpo"))
    phases = [(taught, config.sft.steps, "supervised steps"), (steps, config.steps, "steps")]
    done = [
        f"{lines[-1]['step'] if lines else 0} of {planned} {kind}, "
        for lines, planned, kind in phases
        if planned
    ]
    state = "finished" if finished else "under way or stopped"
    words = [f"{config.model} on {config.train_annotations}: {''.join(done)}{state}."]
    if steps:
        few = max(1, len(steps) // 10)  # as in summary.json
        first, last = (np.mean([line["reward"] for line in part]) for part in (steps[:few], steps[-few:]))
        words.append(f"Mean reward, first and last {few} of {len(steps)} steps: {first:.2f} → {last:.2f}.")
    parts = [page.paragraph(" ".join(words))]
    scores = [line for line in metrics if line["phase"] == "eval"]
    if scores:
        names = {0: "before"} | ({len(scores) - 1: "after"} if finished and len(scores) > 1 else {})
        rows = []
        for k in sorted({0, len(scores) - 1}):
            line, name = scores[k], names.get(k, f"step {scores[k]['step']}")
            kinds = {name: line} | {f"{name}, {kind}": line[kind] for kind in QUESTION_TYPES if kind in line}
            rows += [
                [kind, *(f"{row[key]:.1f}" for key in COLUMNS), row["N"], row["failures"]]
                for kind, row in kinds.items()
            ]
        heads = ["held-out split (%)", *COLUMNS, "N", "failed"]
        parts.append(page.table(heads, rows))
    return [*parts, page.details("Settings that are not the defaults", settings(config))]


def settings(config: Config) -> str:
    rows = []
    ours, defaults = (dataclasses.asdict(c) for c in (config, Config()))
    for key, value in ours.items():
        pairs = [(key, value, defaults[key])]
        if isinstance(value, dict):
            pairs = [(f"{key}.{part}", v, defaults[key].get(part)) for part, v in value.items()]
        rows += [[name, str(v), str(default)] for name, v, default in pairs if v != default]
    return page.table(["setting", "value", "default"], rows)


def gains(evaluations: list[Evaluation]) -> str:
    """What the final boxes gain over the thinking boxes at each evaluation; nothing without these."""
    rows = [(evaluation.name, evaluation.gain) for evaluation in evaluations if evaluation.gain]
    if not rows:
        return ""
    keys = ("m_vIoU_think", "m_vIoU_pred", "gain", "standard_error", "better", "worse", "equal", "N")
    heads = ["vIoU (%)", "think", "pred", "pred - think", "+- s.e.", "better", "worse", "equal", "N"]
    words = (
        "What the final boxes gain over the thinking boxes: mean vIoU of both on held-out videos, the mean"
    )
    words += " difference with its standard error, and the shares of answers with better, worse, equal boxes."
    return page.paragraph(words) + page.table(
        heads, [[name, *(gain[k] for k in keys)] for name, gain in rows]
    )


def draw_prompts(
    groups: dict[str, dict[int, list[dict]]],
    samples: dict[str, Sample],
    clips: dict[str, Clip],
    config: Config,
) -> str:
    """The sampled answers to some prompts at several steps of the training."""
    parts = [page.legend()]
    for key, steps in groups.items():
        sample, clip = samples[key], clips[name_of(samples[key])]
        columns, rows = [], []
        for step, records in steps.items():
            records = sorted(records, key=lambda record: -record["rewards"]["total"])
            mean = np.mean([record["rewards"]["total"] for record in records])
            first, *between = [draw_sampled(record, clip, config) for record in records]
            last = [between.pop()] if between else []
            column = [
                page.heading(f"Step {step}: {len(records)} answers, mean reward {mean:.2f}"),
                first,
                *last,
            ]
            column += [page.details(f"the {len(between)} between", *between)] if between else []
            columns.append("".join(column))
            terms = [name for name in records[0]["rewards"] if name != "total"]
            for record in records:
                rewards = record["rewards"]
                rows.append([step, rewards["total"], record["advantage"], *(rewards[term] for term in terms)])
        table = page.table(["step", "reward", "advantage", *terms], rows)
        parts += [
            page.heading(f"{title(sample)} ({key})"),
            page.grid(*columns, least=clip.width),
            page.details(f"rewards of these {len(rows)} answers", table),
        ]
    return page.section("Sampled answers to the same prompts along the training", *parts)


def draw_sampled(record: dict, clip: Clip, config: Config) -> str:
    """One sampled answer on its frames."""
    parsed = parse_answer(record["completion"], config.think)
    words = f"reward {record['rewards']['total']:.2f}, advantage {record['advantage']:+.2f}"
    return draw_answer(words, parsed and parsed.in_frame(record["scale"]), record["truth"], clip)


def draw_answer(words: str, answer: Answer | None, truth: Truth, clip: Clip) -> str:
    words += "" if answer else ", malformed"
    return page.paragraph(words) + page.tubes(truth, answer, clip.steps, clip.strip, clip.aspect)


def draw_evaluations(
    evaluations: list[Evaluation],
    chosen: dict[str, dict[str, list[str]]],
    known: dict[str, Sample],
    clips: dict[str, Clip],
    config: Config,
) -> str:
    """The held-out answers of each evaluation: some on their frames, beside those to the same sentences at
    the first and the last evaluation; all of them as numbers."""
    parts = [page.legend()]
    for evaluation in evaluations:
        beside = [e for e in evaluations if e in (evaluations[0], evaluation, evaluations[-1])]
        inside = []
        for name, keys in chosen[evaluation.name].items():
            cards = []
            for key in keys:
                sample, clip = known[key], clips[name_of(known[key])]
                given = [e.answers[key] for e in beside if key in e.answers]
                cells = [draw_held_out(answered, sample, clip, config) for answered in given]
                cards.append(page.heading(f"{title(sample)} ({key})"))
                cards.append(page.grid(*cells, least=clip.width))
            inside.append(page.details(f"{name} rewards", *cards, shown=True))
        rows = [
            [key, title(known[key]), given.rewards["total"], given.native["tIoU"], given.native["vIoU"]]
            for key, given in evaluation.answers.items()
        ]
        everything = page.table(["id", "sentence", "reward", "tIoU", "vIoU"], rows, sortable=True)
        inside.append(page.details(f"All {len(rows)} answers as numbers", everything))
        last = evaluation is evaluations[-1]
        parts.append(page.details(evaluation.name, *inside, name="evaluation", shown=last))
    return page.section("Held-out answers", *parts)


def title(sample: Sample) -> str:
    return sample.sentence + (f" ({sample.question_type})" if sample.question_type else "")


def draw_held_out(answered: Answered, sample: Sample, clip: Clip, config: Config) -> str:
    """A held-out answer on its frames, and its text."""
    rewards, native = answered.rewards, answered.native
    scores = {"reward": rewards["total"], "tIoU": native["tIoU"], "vIoU": native["vIoU"]}
    words = f"{answered.name}: {', '.join(f'{name} {value:.2f}' for name, value in scores.items())}"
    terms = ", ".join(f"{name} {value:.2f}" for name, value in rewards.items() if name != "total")
    text = page.details("text and reward terms", page.paragraph(terms), page.verbatim(answered.text))
    truth = sample.truth(config.text_format.step_seconds)
    return draw_answer(words, answered.framed, truth, clip) + text
