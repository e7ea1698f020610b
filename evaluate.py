"""Score a model's answers as the paper does (Tables 1-3), or score answers that were saved earlier.

    python evaluate.py RUN                                     a run folder of train.py, on its held-out split
    python evaluate.py RUN/checkpoint_50                       the same with a checkpoint from along the way
    python evaluate.py CHECKPOINT CONFIG key=value ...         any Qwen-VL, on the held-out split of a config
    python evaluate.py --predictions FILE CONFIG --json        saved answers; needs neither model nor video

Answers go to a new predictions.jsonl in RUN, or in a folder beside the config's output_dir whose name is that
of output_dir and of CHECKPOINT together; --output FILE puts them elsewhere.

First come the metrics as pure functions. A tube is a span and boxes, both on the native frames of the clip:
((first, stop), {frame: box in [0, 1]}), the span half-open. What an answer says in steps becomes a tube on
every native frame first, and is scored as one:

    tIoU = |P and G| / |P or G|        vIoU = sum of IoU(p_f, g_f) over f in P and G / |P or G|
"""

import argparse
import errno
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import toy
from config import Config, ConfigError, load_config
from data import Sample, check_videos, format_report, load_samples
from files import DataError, read_jsonl, write_whole
from model import ModelError, Policy, load_policy, make_prompt, rollout
from prompts import Answer, Box, TextFormat, Truth, from_text_box, parse_answer, truth_answer
from rewards import boxes_by_step, iou, score
from video import VideoError

Tube = tuple[tuple[int, int], dict[int, Box]]


def tube_from_answer(
    answer: Answer | None,
    sample: Sample,
    text_format: TextFormat,
    scale: tuple[int, int],
    which: str = "pred",
) -> Tube | None:
    """From steps to native frames; None for a failed answer: it did not parse, or ends before it starts.

    Step i covers the native frames of its cell, and its box belongs to the frame that was sampled
    (TimeGrid). Between sampled frames boxes are interpolated linearly, also across steps without a box;
    before the first and after the last one they are held. What the answer says beyond the clip's end does
    not exist: a span that lies there altogether is empty. Boxes of steps outside the answer's own span are
    ignored; flipped boxes stay so (their IoU is 0).

    scale: (width, height) of the text's coordinates. which: the list of boxes, "pred" or "think".
    """
    items = answer and getattr(answer, which)
    if not items or answer.end < answer.start:
        return None
    grid = sample.grid(text_format.step_seconds)
    first, stop = grid.first_frame(answer.start), grid.first_frame(answer.end + 1)
    last_step = min(answer.end, grid.num_steps - 1)
    given = boxes_by_step(items, scale)
    steps = sorted(step for step in given if answer.start <= step <= last_step)
    if first == stop or not steps:
        return (first, stop), {}
    frames = range(first, stop)  # no longer than the clip, whatever numbers the answer holds
    sampled = [grid.sampled_frame(step) for step in steps]
    sides = [np.interp(frames, sampled, [given[step][side] for step in steps]).tolist() for side in range(4)]
    return (first, stop), dict(zip(frames, zip(*sides, strict=True), strict=True))


def native_scores(tube: Tube | None, sample: Sample) -> dict[str, float]:
    """The protocol `native`: every native frame of the clip counts, but truth frames without a truth box.

    Returns {"tIoU", "vIoU"} in [0, 1] and "failures", 1 for a tube of None, which scores 0.
    """
    if tube is None:
        return {"tIoU": 0.0, "vIoU": 0.0, "failures": 1}
    (first, stop), boxes = tube
    truth = range(sample.first_frame, sample.stop_frame)
    common = range(max(first, truth.start), min(stop, truth.stop))
    union = stop - first + len(truth) - len(common)
    judged = union - len(truth) + len(sample.boxes)
    overlap = sum(iou(boxes[f], sample.boxes[f]) for f in common if f in boxes and f in sample.boxes)
    return {"tIoU": len(common) / union, "vIoU": overlap / judged, "failures": 0}


def summarize(scores: list[dict[str, float]]) -> dict[str, float]:
    """A row of the paper's tables, in percent, over ALL sentences (N and failures are counts).

    vIoU@R is the share of sentences with vIoU strictly above R. Raises ValueError for no scores at all.
    """
    if not scores:
        raise ValueError("no scores to summarize: the split is empty")
    tious, vious = (np.array([score[name] for score in scores]) for name in ("tIoU", "vIoU"))
    return {
        "m_tIoU": 100 * float(tious.mean()),
        "m_vIoU": 100 * float(vious.mean()),
        "vIoU@0.3": 100 * float((vious > 0.3).mean()),
        "vIoU@0.5": 100 * float((vious > 0.5).mean()),
        "N": len(scores),
        "failures": sum(score["failures"] for score in scores),
    }


def grid_ceiling(samples: list[Sample], text_format: TextFormat) -> dict[str, float]:
    """The row of the answers with the full reward: the truth in steps, read back as native frames.

    It is below 100 where truths begin and end between steps, and where boxes do not move evenly between
    them. Print it beside the score.
    """
    scale, scores = (1000, 1000), []
    for sample in samples:
        answer = truth_answer(sample.truth(text_format.step_seconds), scale)
        scores.append(native_scores(tube_from_answer(answer, sample, text_format, scale), sample))
    return summarize(scores)


# ----------------------------------------------------------------------------------------------------------
# From a model to predictions, from predictions to the paper's row


def decode_split(policy: Policy, samples: list[Sample], config: Config, name: str) -> list[dict]:
    """The model's answers, greedy unless eval_temperature says otherwise: one record a sample, in order."""
    records = []
    with tqdm(total=len(samples), desc=f"evaluate {name}", unit="answer") as bar:
        for first in range(0, len(samples), config.eval_batch):
            part = samples[first : first + config.eval_batch]
            prompts = [make_prompt(policy, sample, config.max_side, config.text_format) for sample in part]
            keys = [(config.seed, first + k) for k in range(len(part))]
            answers = rollout(policy, prompts, 1, config.max_new_tokens, config.eval_temperature, keys)
            for sample, prompt, (completion,) in zip(part, prompts, answers, strict=True):
                truth = sample.truth(config.text_format.step_seconds)
                scored = score(completion.text, truth, prompt.scale, config.rewards, config.think)
                record = answer_record(completion.text, scored.answer, truth, prompt.scale, config.think)
                about = {"id": sample.id, "sentence": sample.sentence}
                records.append(
                    about | record | {"rewards": scored.rewards, "truncated": completion.truncated}
                )
            bar.update(len(part))
    return records


def answer_record(
    text: str, answer: Answer | None, truth: Truth, scale: tuple[int, int], think: bool
) -> dict:
    """What predictions.jsonl and rollouts.jsonl say of an answer: its text, the truth in steps, and what was
    parsed, with boxes in [0, 1]. `python rewards.py` reads it."""

    def in_frame(items: tuple[tuple[int, Box], ...] | None) -> list | None:
        return items and [[step, [round(v, 4) for v in from_text_box(box, scale)]] for step, box in items]

    boxes = {str(step): list(box) for step, box in truth.boxes.items()}
    return {
        "completion": text,
        "truth": {"span": list(truth.span), "boxes": boxes},
        "scale": list(scale),
        "think": think,
        "span": answer and [answer.start, answer.end],
        "think_boxes": answer and in_frame(answer.think),
        "pred_boxes": answer and in_frame(answer.pred),
    }


def score_predictions(predictions: list[dict], samples: list[Sample], config: Config) -> dict[str, dict]:
    """protocol -> the paper's row. predictions: at most one for each sample. A sample without one is a
    failure and counts; a prediction without a sample raises DataError. Nothing but "id" and "completion" is
    needed (and "scale" where the coordinates are `resized`, which depend on the model)."""
    known = {sample.id for sample in samples}
    by_id = {prediction["id"]: prediction for prediction in predictions}
    for key in by_id:
        if key not in known:
            raise DataError(
                f"prediction {key!r}: no such sentence in {config.eval_annotations}; is it another split's"
                " (or beyond eval_limit)?"
            )
    scores = []
    for sample in samples:
        prediction = by_id.get(sample.id)
        if prediction is None:
            scores.append(native_scores(None, sample))
            continue
        answer = parse_answer(prediction["completion"], config.think)
        scale = scale_of(prediction, sample, config)
        scores.append(native_scores(tube_from_answer(answer, sample, config.text_format, scale), sample))
    return {"native": summarize(scores)}


def scale_of(prediction: dict, sample: Sample, config: Config) -> tuple[int, int]:
    """(width, height) that the boxes of a prediction are measured in. Raises DataError."""
    if config.coordinates != "resized":
        return config.text_format.scale((0, 0), (sample.width, sample.height))
    match prediction.get("scale"):
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    raise DataError(
        f'prediction {sample.id!r}: with coordinates: resized each needs "scale": [width, height], the'
        " size in pixels of the frames that the model saw"
    )


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """The paper's columns for named rows, with N and the share of failed answers beside them."""
    columns = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5")
    lines = [" " * 12 + "".join(f"{name:>10}" for name in (*columns, "N", "failed"))]
    for name, row in rows.items():
        numbers = "".join(f"{row[column]:>10.1f}" for column in columns)
        lines.append(f"{name:<12}{numbers}{row['N']:>10}{row['failures'] / row['N']:>10.1%}")
    return "\n".join(lines)


def write_jsonl(records: list[dict], path: Path, append: bool = False) -> None:
    """One JSON object a line. A new file appears whole or not at all; with append, all lines are added at the
    end, or none."""
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if append:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(text) < len(text):  # the disk is full
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    else:
        write_whole(path, text)


def read_predictions(path: Path) -> list[dict]:
    """Saved answers, at most one for each id. Raises DataError that names the file and the line."""
    predictions = read_jsonl(path, "id", "completion")
    lines: dict[str, int] = {}
    for number, prediction in enumerate(predictions, 1):
        key = prediction["id"]
        if not (isinstance(key, str) and isinstance(prediction["completion"], str)):
            raise DataError(f'{path}, line {number}: "id" and "completion" must be texts; correct the line')
        if key in lines:
            raise DataError(f"{path}, line {number}: {key!r} is answered in line {lines[key]}; keep one")
        lines[key] = number
    return predictions


# ----------------------------------------------------------------------------------------------------------
# The script


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\nFirst")[0]
    )
    parser.add_argument("words", nargs="*", metavar="RUN | CHECKPOINT CONFIG | key=value")
    parser.add_argument("--predictions", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    settings = [word for word in options.words if "=" in word]
    places = [word for word in options.words if "=" not in word]

    if options.predictions:
        if len(places) != 1:
            parser.error("--predictions FILE needs one CONFIG, and no model")
        config = load_config(places[0], settings)
        samples = load_split(config, config.eval_annotations)[: config.eval_limit or None]
        predictions = read_predictions(options.predictions)
        rows = score_predictions(predictions, samples, config)
        if len(predictions) < len(samples):
            print(f"{len(samples) - len(predictions)} sentences have no answer: failures", file=sys.stderr)
    else:
        if len(places) == 1:
            folder = Path(places[0])  # not output_dir: a run may have been moved
            checkpoint = folder / "checkpoint"
            if not (folder / "config.yaml").is_file():
                folder, checkpoint = folder.parent, folder
            if not (folder / "config.yaml").is_file():
                raise ConfigError(
                    f"{places[0]} is no run of train.py, nor a checkpoint in one; for another checkpoint name"
                    " a configuration too, such as configs/toy.yaml"
                )
            config = load_config(folder / "config.yaml", settings)
        elif len(places) == 2:
            checkpoint, config = places[0], load_config(places[1], settings)
            folder = Path(f"{Path(config.output_dir)}_{Path(checkpoint).resolve().name}")
        else:
            parser.error("name a run folder of train.py, or a checkpoint and a CONFIG")
        if config.threads:
            torch.set_num_threads(config.threads)
        samples = load_split(config, config.eval_annotations)[: config.eval_limit or None]
        check_videos(samples)
        policy = load_policy(str(checkpoint), device="cuda" if torch.cuda.is_available() else "cpu")
        output = options.output or unused(folder / "predictions.jsonl")
        check_output(output)
        predictions = decode_split(policy, samples, config, str(checkpoint))
        write_jsonl(predictions, output)
        rows = score_predictions(predictions, samples, config)
        reward = np.mean([prediction["rewards"]["total"] for prediction in predictions])
        print(f"mean reward {reward:.2f}; the answers are in {output}", file=sys.stderr)
    print(json.dumps(rows) if options.json else format_table(rows))
    ceiling = grid_ceiling(samples, config.text_format)
    best = ", ".join(f"{name} {ceiling[name]:.1f}" for name in ("m_tIoU", "m_vIoU"))
    print(f"(the best that answers on this grid of steps can reach: {best})", file=sys.stderr)


def load_split(config: Config, annotations: str) -> list[Sample]:
    """The samples of a split, made first where it is the toy's; what was repaired is printed to stderr."""
    if config.toy:
        toy.make_world(config.videos)
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    print(f"{annotations}: {len(samples)} sentences\n{format_report(report)}", file=sys.stderr)
    return samples


def check_output(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises OSError, before hours of decoding, where that
    or the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def unused(path: Path) -> Path:
    """The path itself, or its first numbered sibling that does not exist: nothing is overwritten."""
    candidates = (path.with_stem(f"{path.stem}.{n}") for n in itertools.count(2))
    return path if not path.exists() else next(c for c in candidates if not c.exists())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, ModelError, VideoError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        place = error.filename or "standard output"
        sys.exit(f"error: {place}: {error.strerror}; free some space, or choose another place with --output")
