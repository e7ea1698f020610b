"""Score a model's answers as the paper does (Tables 1-4), or score answers that were saved earlier.

    python evaluate.py RUN                                     a run folder of train.py, on its held-out split
    python evaluate.py RUN/checkpoint_50                       the same with a checkpoint from along the way
    python evaluate.py CHECKPOINT CONFIG key=value ...         any Qwen-VL, on the held-out split of a config
    torchrun --nproc_per_node=8 evaluate.py ...                the same on eight GPUs, with the same answers
    python evaluate.py ... --control blank                     or shuffled, or other: is the video used?
    python evaluate.py --predictions FILE --data CONFIG        saved answers; needs neither model nor video
    python evaluate.py --table RUN ...                         finished runs as the paper's Tables 5-8

Where CONFIG stands there may be several, laid over one another as by train.py. Controls: controls.py.
Answers go to predictions.jsonl in RUN (predictions_of_checkpoint_50.jsonl, predictions_blank.jsonl); with a
CONFIG to a folder beside its output_dir, named after that and the run or the checkpoint; --output FILE puts
them elsewhere. While it runs, each rank adds its own to a file beside that, and when it is started again it
decodes only what is missing. Answers made in another way (another checkpoint, other settings or annotations)
are left alone: then the file is predictions.2.jsonl, and so on.
Beside the paper's row (metrics.py) there is what the final boxes gain over the thinking boxes, and, where
answers were decoded, what a video took (Table 9; eval_batch=1 for one at a time).
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import DTYPES, Config, ConfigError, load_config
from data import DROPS, Report, check_videos, count_sentences, format_report, load_samples
from lab import compare
from lab.controls import CONTROLS, Controlled, other_sample
from metrics import format_gain, format_table, score_answers, think_gain, tube_of
from model import Completion, Prompt, make_prompt, rollout
from prompts import Answer, Items, parse_csv_answer, read_answer
from qwen.checkpoint import Policy, load_policy
from rewards import score
from runtime import distributed, logs
from runtime.files import DataError, UserError, read_jsonl, run_script, write_jsonl
from runtime.plugins import RewardError, load_plugins
from runtime.predictions import (
    answered,
    check_output,
    fingerprint_of,
    gather_answers,
    place_for_answers,
    read_predictions,
)
from samples import Sample, Truth
from toy import world as toy_world
from video.loader import FrameLoader, open_loader

# ----------------------------------------------------------------------------------------------------------
# From a model to predictions


def decode(
    policy: Policy,
    samples: list[tuple[int, Sample]],
    clips: FrameLoader | Controlled,
    config: Config,
    name: str,
) -> Iterator[list[dict]]:
    """The model's answers, eval_batch records at a time, in order; greedy unless eval_temperature says
    otherwise.

    samples: each with its number in the split, from which its random numbers are drawn. name: for the bar,
    which the first rank shows.
    A sample whose video cannot be read (on_bad_video: skip) gets an empty answer, which is a failure.
    """
    rank, ranks = distributed.init()
    where = f" (rank 0 of {ranks})" if ranks > 1 else ""
    with tqdm(total=len(samples), desc=f"evaluate {name}{where}", unit="answer", disable=rank > 0) as bar:
        for first in range(0, len(samples), config.eval_batch):
            part = samples[first : first + config.eval_batch]
            ahead = first + 2 * config.eval_batch + config.video_workers
            clips.prefetch([sample for _, sample in samples[first:ahead]])
            frames = [(number, sample, clips.frames(sample)) for number, sample in part]
            shown = [
                (number, make_prompt(policy, sample, clip, config.text_format))
                for number, sample, clip in frames
                if clip is not None
            ]
            prompts, keys = [prompt for _, prompt in shown], [(config.seed, number) for number, _ in shown]
            answers = rollout(
                policy,
                prompts,
                1,
                config.max_new_tokens,
                config.eval_temperature,
                keys,
            )
            given = {number: (p, answer) for (number, p), (answer,) in zip(shown, answers, strict=True)}
            yield [prediction(sample, *given.get(number, (None, None)), config) for number, sample in part]
            bar.update(len(part))


def prediction(sample: Sample, prompt: Prompt | None, completion: Completion | None, config: Config) -> dict:
    """A record of predictions.jsonl. prompt, completion: None where the video could not be read."""
    text_format = config.text_format
    record = {"id": sample.id, "sentence": sample.sentence}
    if sample.question_type:
        record["question_type"] = sample.question_type
    truth = sample.truth(text_format.step_seconds)
    text = "" if completion is None else completion.text
    size = (sample.width, sample.height)
    scale = text_format.scale(size, size) if prompt is None else prompt.scale
    record |= answer_record(text, read_answer(text, text_format), truth, scale, config.think)
    if text_format.answer_format == "boxes":  # the rewards are of this format
        scored = score(text, truth, scale, config.rewards, config.think)
        record["rewards"] = scored.rewards
    if completion is None:
        return record | {"unreadable": True}
    return record | {"length": len(completion.ids), "truncated": completion.truncated}


def answer_record(
    text: str, answer: Answer | None, truth: Truth, scale: tuple[int, int], think: bool
) -> dict:
    """What predictions.jsonl and rollouts.jsonl say of an answer: its text, the truth in steps, and what was
    parsed, with boxes in [0, 1]. `python rewards.py` reads it."""

    def rounded(items: Items | None) -> list | None:
        return items and [[step, [round(v, 4) for v in box]] for step, box in items]

    framed = answer and answer.in_frame(scale)
    boxes = {str(step): list(box) for step, box in truth.boxes.items()}
    return {
        "completion": text,
        "truth": {"span": list(truth.span), "boxes": boxes},
        "scale": list(scale),
        "think": think,
        "span": answer and list(answer.span),
        "think_boxes": framed and rounded(framed.think),
        "pred_boxes": framed and rounded(framed.pred),
    }


# ----------------------------------------------------------------------------------------------------------
# Many ranks, and a second start


@dataclass(frozen=True)
class Spent:
    """What a rank has decoded, and how long it took."""

    seconds: float  # wall time: reading the videos, encoding the prompts, sampling, scoring
    answers: int  # those of videos that could be read
    tokens: int  # of these answers, ends included


def decode_split(
    policy: Policy,
    samples: list[Sample],
    clips: FrameLoader,
    config: Config,
    output: Path,
    fingerprint: str,
    stop: distributed.Stop | None = None,
) -> list[dict] | None:
    """Decode what `output` does not hold yet, shared among the ranks. Returns all records of the samples, in
    order, on every rank, and leaves them in `output`; None where it was stopped before that."""
    if decode_missing(policy, samples, clips, config, output, fingerprint, stop) is None:
        return None
    return gather_answers(output, samples, fingerprint)


def decode_missing(
    policy: Policy,
    samples: list[Sample],
    clips: FrameLoader | Controlled,
    config: Config,
    output: Path,
    fingerprint: str,
    stop: distributed.Stop | None = None,
) -> Spent | None:
    """This rank's part of what `output` does not hold yet; None where it was stopped before the end.

    fingerprint: how the answers come about (fingerprint_of), for the records; those of others do not count.
    Each rank adds its answers to a file of its own beside output, so that a killed run loses a batch at most;
    gather_answers puts them together. Raises RewardError, on all ranks, where a reward of one's own fails.
    """
    rank, ranks = distributed.init()
    done = answered(output, fingerprint)
    distributed.barrier()  # all ranks must have read the same before one of them writes
    todo = [(n, sample) for n, sample in enumerate(samples) if sample.id not in done]
    if len(todo) < len(samples) and rank == 0:
        print(f"{len(samples) - len(todo)} answers are in {output.parent}/ already", file=sys.stderr)
    part = output.with_name(f"{output.stem}.rank{rank}{output.suffix}")
    if part.exists():
        write_jsonl(read_jsonl(part, "id", skip_cut=True), part)  # without the line that was cut
    name, lengths, began = output.stem.removeprefix("predictions_"), [], time.perf_counter()
    fault = ""
    try:
        for records in decode(policy, todo[rank::ranks], clips, config, name):
            write_jsonl([{**record, "fingerprint": fingerprint} for record in records], part, append=True)
            lengths += [record["length"] for record in records if "length" in record]
            if stop and stop.asked:
                break
    except RewardError as error:
        fault = str(error)
    seconds = time.perf_counter() - began
    for message in filter(None, distributed.all_gather(fault)):
        raise RewardError(message)
    if stop and stop.agreed():
        return None
    return Spent(seconds, len(lengths), sum(lengths))


# ----------------------------------------------------------------------------------------------------------
# From predictions to the paper's row


def score_predictions(predictions: list[dict], samples: list[Sample], config: Config) -> dict[str, dict]:
    """protocol -> the paper's row (metrics.score_answers). predictions: at most one for each sample. A sample
    without one is a failure and counts; a prediction without a sample raises DataError. Nothing but "id" and
    "completion" is needed (and "scale" where the coordinates are `resized`, which depend on the model)."""
    known = {sample.id for sample in samples}
    by_id = {prediction["id"]: prediction for prediction in predictions}
    for key in by_id:
        if key not in known:
            raise DataError(
                f"prediction {key!r}: no such sentence in {config.eval_annotations}; is it another split's"
                " (or beyond eval_limit)?"
            )

    tubes = (tube_of(by_id.get(sample.id), sample, config) for sample in samples)
    return score_answers(tubes, samples, config.text_format)


# ----------------------------------------------------------------------------------------------------------
# The script


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="RUN | CHECKPOINT CONFIG ... | key=value")
    parser.add_argument("--control", choices=CONTROLS, help="what the model is shown instead of the video")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these answers")
    parser.add_argument("--data", nargs="+", metavar="CONFIG", help="the configuration they belong to")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the answers go")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument(
        "--table", nargs="+", metavar="RUN", help="print the paper's Tables 5-8 for these runs"
    )
    options = parser.parse_intermixed_args(arguments)  # settings may stand anywhere
    if options.table:
        if len(arguments) > 1 + len(options.table):
            parser.error("--table RUN ... stands alone")
        return compare.main(options.table)
    words = options.words + (options.data or [])
    settings = [word for word in words if "=" in word]
    places = [word for word in words if "=" not in word]
    named = any("=" not in word for word in options.words)  # a model, or a configuration without --data
    rank, _ = distributed.init()
    if options.predictions:
        if named == bool(options.data) or not places or options.control or options.output:
            parser.error("--predictions FILE needs --data CONFIG, and takes no model, --control or --output")
        config, cost = load_config(places, settings), None
        samples, predictions = answers_from_file(options.predictions, config)
    else:
        if options.data or not places:
            parser.error("name a run folder of train.py, or a checkpoint and a CONFIG")
        checkpoint, wanted, config = find_checkpoint(places, settings)
        if options.control:
            wanted = wanted.with_stem(f"{wanted.stem}_{options.control}")
        samples, predictions, cost = answers_of_checkpoint(
            checkpoint, config, wanted, options.output, options.control
        )
    distributed.destroy()
    if rank:
        return
    rows, gain = score_predictions(predictions, samples, config), think_gain(predictions, samples, config)
    if options.json:
        beside = {"think": gain, "cost": cost, "control": options.control}
        print(json.dumps(rows | {name: value for name, value in beside.items() if value}))
        return
    if options.control:
        print(f"control: {options.control}: the model was shown {CONTROLS[options.control]}")
    print(format_table(rows))
    if gain:
        print(format_gain(gain))


def above_one(text: str) -> bool:
    """Whether a CSV answer has a coordinate clearly outside the frame: pixels, or thousandths."""
    answer = parse_csv_answer(text)
    return answer is not None and any(max(box) > 1.5 for _, box in answer.pred)


def settings_note(checkpoint: str, config: Config) -> str:
    """A line for each setting in which a run's checkpoint was trained to see or to say something else."""
    path = Path(checkpoint).resolve().parent / "config.yaml"
    if not path.is_file():
        return ""
    try:
        trained, note = load_config(path), ""
    except UserError as error:  # such as a reward's file that is gone, or a key of an older version
        return f"note: what {checkpoint} was trained with is not known: {error}\n"
    for key in ("fps", "max_side", "time_unit", "coordinates", "think", "answer_format"):
        before, now = getattr(trained, key), getattr(config, key)
        if before != now:
            note += f"note: {checkpoint} was trained with {key}: {before}, and is asked with {now}\n"
    return note


def coordinates_note(policy: Policy, config: Config) -> str:
    """A line where a checkpoint's family was pre-trained to write boxes otherwise than it is asked to."""
    family = policy.family
    if config.toy or config.coordinates in (family.coordinates, "relative"):
        return ""
    return (
        f"note: {family.name} has learned coordinates: {family.coordinates} in its pre-training, and is asked"
        f' for {config.coordinates} (README, "Assumptions")\n'
    )


def answers_from_file(path: Path, config: Config) -> tuple[list[Sample], list[dict]]:
    """The samples of the held-out split and the saved answers to them; what stands out, to stderr."""
    samples, report = load_split(config, config.eval_annotations)
    samples = samples[: config.eval_limit or None]
    dropped = {key for reason in DROPS for key in report.get(reason, [])}
    saved = read_predictions(path)
    predictions = [p for p in saved if p["id"] not in dropped]
    beyond = sum(config.answer_format == "csv" and above_one(p["completion"]) for p in predictions)
    notes = {
        "answers are to sentences that were dropped: left out": len(saved) - len(predictions),
        "sentences have no answer: failures": len(samples) - len(predictions),
        "answers have coordinates above 1, which are taken for 1": beyond,
    }
    rank, _ = distributed.init()
    for note, count in notes.items():
        if count > 0 and rank == 0:
            print(f"{count} {note}", file=sys.stderr)
    return samples, predictions


def answers_of_checkpoint(
    checkpoint: str, config: Config, wanted: Path, output: Path | None, control: str | None = None
) -> tuple[list[Sample], list[dict], dict | None]:
    """The samples of the held-out split and the model's answers to them, decoded where they are not saved
    yet, and what that took (cost_of); on every rank. output: the file for them; without one `wanted` or a
    sibling of it. control: one of CONTROLS; None: the videos as they are."""
    rank, _ = distributed.init()
    if config.threads:
        torch.set_num_threads(config.threads)
    load_plugins(config.rewards)
    split = load_split(config, config.eval_annotations)[0]
    samples, cost = split[: config.eval_limit or None], None
    others = [other_sample(split, number) for number in range(len(samples)) if control == "other"]
    fingerprint = fingerprint_of(checkpoint, config, control)
    path = place_for_answers(output or wanted, fingerprint, others=output is None)
    done = answered(path, fingerprint)
    if not all(sample.id in done for sample in samples):
        if config.on_bad_video == "error":
            check_videos(samples + others)
        policy = load_policy(checkpoint, getattr(torch, DTYPES[config.precision]), distributed.device())
        check_output(path)
        if rank == 0:
            notes = coordinates_note(policy, config) + settings_note(checkpoint, config)
            print(notes, end="", file=sys.stderr)
        with contextlib.closing(open_loader(config, policy.size_factor)) as clips:
            shown = Controlled(clips, control, split, config.seed) if control else clips
            spent = decode_missing(policy, samples, shown, config, path, fingerprint)
        cost = cost_of(spent, config.eval_batch)
    predictions = gather_answers(path, samples, fingerprint)
    if rank == 0:
        report_answers(predictions, len(done), path)
        if cost:
            print(format_cost(cost), file=sys.stderr)
    return samples, predictions, cost


def cost_of(spent: Spent, eval_batch: int) -> dict | None:
    """What a video takes, as in STVG-o1, Table 9, by what the ranks have decoded; None where that is nothing.
    For all ranks to call, and on every rank the same.

    Returns "answers" decoded; "seconds" of one, the wall time of a rank by its answers, mean of the ranks;
    "tokens" of one; "batch", how many were decoded at a time; "peak_memory" (logs.peak_memory) of the rank
    with the most, in GB.
    """
    peak, ranks = distributed.all_reduce_max(logs.peak_memory()), distributed.all_gather(vars(spent))
    ranks = [rank for rank in ranks if rank["answers"]]
    if not ranks:
        return None
    answers = [rank["answers"] for rank in ranks]
    return {
        "answers": sum(answers),
        "seconds": float(np.mean([rank["seconds"] / rank["answers"] for rank in ranks])),
        "tokens": sum(rank["tokens"] for rank in ranks) / sum(answers),
        "batch": min(eval_batch, max(answers)),
        "peak_memory": peak,
    }


def format_cost(cost: dict) -> str:
    """cost_of's numbers as a line, with the paper's beside them."""
    return (
        f"per video: {cost['seconds']:.3g} s, {cost['tokens']:.0f} tokens, {cost['batch']} at a time; peak"
        f" {cost['peak_memory']:.1f} GB ({cost['answers']} decoded; the paper's Table 9: 15.49 s, 24.2 GB on"
        " one GPU)"
    )


def find_checkpoint(places: list[str], settings: list[str]) -> tuple[str, Path, Config]:
    """RUN, RUN/checkpoint_50, or CHECKPOINT CONFIG [CONFIG ...] -> the checkpoint, the file for its answers,
    the settings.

    A checkpoint with a CONFIG gets a folder beside the config's output_dir, where another run lives, with the
    name of the run it comes from, or its own.
    """
    if len(places) > 1:
        path, config = Path(places[0]).resolve(), load_config(places[1:], settings)
        name = path.name
        if (path.parent / "config.yaml").is_file():
            name = f"{path.parent.name}_{path.name}".replace("_checkpoint", "")
        return places[0], Path(f"{Path(config.output_dir)}_{name}") / "predictions.jsonl", config
    folder = Path(places[0])  # not output_dir: a run may have been moved
    checkpoint = folder / "checkpoint"
    if not (folder / "config.yaml").is_file():
        folder, checkpoint = folder.parent, folder
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{places[0]} is no run of train.py, nor a checkpoint in one; for another checkpoint name"
            " a configuration too, such as configs/toy.yaml"
        )
    name = "predictions" if checkpoint.name == "checkpoint" else f"predictions_of_{checkpoint.name}"
    return str(checkpoint), folder / f"{name}.jsonl", load_config(folder / "config.yaml", settings)


def report_answers(predictions: list[dict], before: int, output: Path) -> None:
    """Where the answers are, `before` of them already before this start, and what stands out; to stderr."""
    text = f"the answers are in {output}"
    if before >= len(predictions):
        text += ", all of them from before"
    rewards = [prediction["rewards"]["total"] for prediction in predictions if "rewards" in prediction]
    if rewards:
        text = f"mean reward {np.mean(rewards):.2f}; {text}"
    malformed = [prediction for prediction in predictions if prediction["span"] is None]
    if malformed:
        cut = sum(prediction.get("truncated", False) for prediction in malformed)
        text += f"; {len(malformed)} do not parse, {cut} of them cut off at max_new_tokens"
    unreadable = sum("unreadable" in prediction for prediction in predictions)
    if unreadable:
        text += f"; {unreadable} of them are empty, since their videos cannot be read"
    print(text, file=sys.stderr)


def load_split(config: Config, annotations: str) -> tuple[list[Sample], Report]:
    """The samples of a split, made first where it is the toy's, and what was found in it, which is printed to
    stderr too."""
    rank, _ = distributed.init()
    if config.toy:
        if rank == 0:
            toy_world.make_world(config.videos)
        distributed.barrier()
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    if rank == 0:
        counts = count_sentences(samples, report)
        print(f"{annotations}: {counts}\n{format_report(report)}", file=sys.stderr)
    return samples, report


if __name__ == "__main__":
    run_script(
        lambda: main(sys.argv[1:]),
        "standard output",
        "free some space, or choose another place with --output",
        "stopped: the answers so far are kept; start again to go on",
    )
