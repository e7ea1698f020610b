"""Score a model's answers as the paper does (Tables 1-4), or score answers that were saved earlier.

    python evaluate.py RUN                                     a run folder of train.py, on its held-out split
    python evaluate.py RUN/checkpoint_50                       the same with a checkpoint from along the way
    python evaluate.py CHECKPOINT CONFIG key=value ...         any Qwen-VL, on the held-out split of a config
    torchrun --nproc_per_node=8 evaluate.py ...                the same on eight GPUs, with the same answers
    python evaluate.py --predictions FILE --data CONFIG        saved answers; needs neither model nor video

Answers go to predictions.jsonl in RUN (predictions_of_checkpoint_50.jsonl); with a CONFIG to a folder beside
its output_dir, named after that and the run or the checkpoint; --output FILE puts them elsewhere. While it
runs, each rank adds its own to a file beside that, and when it is started again it decodes only what is
missing. Answers made in another way (another checkpoint, other settings or annotations) are left alone: then
the file is predictions.2.jsonl, and so on. The metrics are in metrics.py.
"""

import argparse
import contextlib
import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import toy
from clips import Clips, open_clips
from config import DTYPES, Config, ConfigError, load_config
from data import DROPS, Report, Sample, check_videos, count_sentences, format_report, load_samples
from files import DataError, read_jsonl, run_script, write_jsonl
from marks import weights_mark
from metrics import Tube, format_table, score_answers, tube_from_answer
from model import Completion, Prompt, make_prompt, rollout
from policy import Policy, load_policy
from prompts import Answer, Items, Truth, parse_csv_answer, read_answer
from rewards import RewardError, score

# ----------------------------------------------------------------------------------------------------------
# From a model to predictions


def decode(
    policy: Policy, samples: list[tuple[int, Sample]], clips: Clips, config: Config, name: str
) -> Iterator[list[dict]]:
    """The model's answers, eval_batch records at a time, in order; greedy unless eval_temperature says
    otherwise.

    samples: each with its number in the split, from which its random numbers are drawn. name: for the bar,
    which the first rank shows.
    A sample whose video cannot be read (on_bad_video: skip) gets an empty answer, which is a failure.
    """
    rank, ranks = distributed.join()
    where = f" (rank 0 of {ranks})" if ranks > 1 else ""
    with tqdm(total=len(samples), desc=f"evaluate {name}{where}", unit="answer", disable=rank > 0) as bar:
        for first in range(0, len(samples), config.eval_batch):
            part = samples[first : first + config.eval_batch]
            ahead = first + 2 * config.eval_batch + config.decode_workers
            clips.ahead([sample for _, sample in samples[first:ahead]])
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
                block=config.decode_block,
                static=config.static_shapes,
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
        if scored.fault:
            raise RewardError(f"{sample.id!r}: {scored.fault}")
        record["rewards"] = scored.rewards
    return record | ({"unreadable": True} if completion is None else {"truncated": completion.truncated})


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


def decode_split(
    policy: Policy,
    samples: list[Sample],
    clips: Clips,
    config: Config,
    output: Path,
    fingerprint: str,
    stop: distributed.Stop | None = None,
) -> list[dict] | None:
    """Decode what `output` does not hold yet, shared among the ranks. Returns all records of the samples, in
    order, on every rank, and leaves them in `output`; None where it was stopped before that.

    fingerprint: how the answers come about (fingerprint_of), for the records; those of others do not count.
    Each rank adds its answers to a file of its own beside output, so that a killed run loses a batch at most;
    gather puts them together.
    """
    rank, ranks = distributed.join()
    done = answered(output, fingerprint)
    distributed.wait()  # all ranks must have read the same before one of them writes
    todo = [(n, sample) for n, sample in enumerate(samples) if sample.id not in done]
    if len(todo) < len(samples) and rank == 0:
        print(f"{len(samples) - len(todo)} answers are in {output.parent}/ already", file=sys.stderr)
    part = output.with_name(f"{output.stem}.rank{rank}{output.suffix}")
    if part.exists():
        write_jsonl(read_jsonl(part, "id", skip_cut=True), part)  # without the line that was cut
    name = output.stem.removeprefix("predictions_")
    for records in decode(policy, todo[rank::ranks], clips, config, name):
        write_jsonl([{**record, "fingerprint": fingerprint} for record in records], part, append=True)
        if stop and stop.asked:
            break
    if stop and stop.agreed():
        return None
    return gather(output, samples, fingerprint)


def gather(output: Path, samples: list[Sample], fingerprint: str) -> list[dict]:
    """The records of the samples, in order, when all ranks are here; from then on they are in `output`, and
    the ranks' files are gone."""
    rank, _ = distributed.join()
    distributed.wait()
    done = {r["id"]: r for r in saved_answers(output) if r.get("fingerprint") == fingerprint}
    distributed.wait()  # all ranks must have read before the parts go
    if rank == 0 and rank_files(output):
        order = {sample.id: n for n, sample in enumerate(samples)}
        write_jsonl(sorted(done.values(), key=lambda r: order.get(r["id"], len(order))), output)
        for path in rank_files(output):
            path.unlink()
    distributed.wait()
    return [done[sample.id] for sample in samples]


def rank_files(output: Path) -> list[Path]:
    """What the ranks of this run, or of one that was stopped, have put beside a file of answers."""
    return sorted(output.parent.glob(f"{glob.escape(output.stem)}.rank*{output.suffix}"))


def saved_answers(output: Path) -> list[dict]:
    """The records in a file of answers and in the ranks' files beside it. Raises DataError."""
    paths = [output] * output.exists() + rank_files(output)
    records = [record for path in paths for record in read_jsonl(path, "id", "completion", skip_cut=True)]
    if not all(isinstance(record["id"], str) for record in records):
        raise DataError(f'{output}: not every "id" in it is a text; choose another --output')
    return records


def answered(output: Path, fingerprint: str) -> dict[str, dict]:
    """id -> record of what need not be decoded again; a video that could not be read may be there by now."""
    records = [r for r in saved_answers(output) if r.get("fingerprint") == fingerprint]
    return {record["id"]: record for record in records if "unreadable" not in record}


def fingerprint_of(checkpoint: str, config: Config) -> str:
    """A short mark of all that an answer depends on: the weights, the annotations and the settings."""
    asked = hashlib.sha256(Path(config.eval_annotations).read_bytes()).hexdigest()
    names = ("dataset", "seed", "rewards", "max_new_tokens", "eval_temperature", "max_side", "precision")
    settings = [getattr(config, name) for name in names]
    text = json.dumps(
        [weights_mark(checkpoint), asked, settings, dataclasses.asdict(config.text_format)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place_for_answers(wanted: Path, fingerprint: str, others: bool) -> Path:
    """Where to put answers: the wanted file, or with `others` the first of its numbered siblings, that does
    not exist or holds answers made in the same way. Raises DataError or OSError where there is none."""
    if wanted.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(wanted))
    numbered = (wanted.with_stem(f"{wanted.stem}.{n}") for n in itertools.count(2))
    for path in itertools.chain([wanted], numbered if others else []):
        if all(record.get("fingerprint") == fingerprint for record in saved_answers(path)):
            return path
    raise DataError(f"{wanted}: holds answers made in another way; choose another --output")


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

    def tube(sample: Sample) -> Tube | None:
        if sample.id not in by_id:
            return None
        answer = read_answer(by_id[sample.id]["completion"], config.text_format)
        scale = scale_of(by_id[sample.id], sample, config)
        return tube_from_answer(answer, sample, config.text_format, scale)

    return score_answers(map(tube, samples), samples, config.text_format)


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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="RUN | CHECKPOINT CONFIG | key=value")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these answers")
    parser.add_argument("--data", metavar="CONFIG", help="the configuration that they belong to")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the answers go")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    options = parser.parse_intermixed_args(arguments)  # settings may stand anywhere
    settings = [word for word in options.words if "=" in word]
    places = [word for word in options.words if "=" not in word]
    rank, _ = distributed.join()
    if options.predictions:
        places += [options.data] if options.data else []
        if len(places) != 1:
            parser.error("--predictions FILE needs one --data CONFIG, and no model")
        config = load_config(places[0], settings)
        samples, predictions = answers_from_file(options.predictions, config)
    else:
        if options.data or not 1 <= len(places) <= 2:
            parser.error("name a run folder of train.py, or a checkpoint and a CONFIG")
        checkpoint, wanted, config = find_checkpoint(places, settings)
        samples, predictions = answers_of_checkpoint(checkpoint, config, wanted, options.output)
    distributed.leave()
    if rank:
        return
    rows = score_predictions(predictions, samples, config)
    print(json.dumps(rows) if options.json else format_table(rows))


def above_one(text: str) -> bool:
    """Whether a CSV answer has a coordinate clearly outside the frame: pixels, or thousandths."""
    answer = parse_csv_answer(text)
    return answer is not None and any(max(box) > 1.5 for _, box in answer.pred)


def settings_note(checkpoint: str, config: Config) -> str:
    """A line for each setting in which a run's checkpoint was trained to see or to say something else."""
    path = Path(checkpoint).resolve().parent / "config.yaml"
    if not path.is_file():
        return ""
    trained, note = load_config(path), ""
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
    rank, _ = distributed.join()
    for note, count in notes.items():
        if count > 0 and rank == 0:
            print(f"{count} {note}", file=sys.stderr)
    return samples, predictions


def answers_of_checkpoint(
    checkpoint: str, config: Config, wanted: Path, output: Path | None
) -> tuple[list[Sample], list[dict]]:
    """The samples of the held-out split and the model's answers to them, decoded where they are not saved
    yet; on every rank. output: the file for them; without one `wanted` or a sibling of it."""
    rank, _ = distributed.join()
    if config.threads:
        torch.set_num_threads(config.threads)
    samples = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
    fingerprint = fingerprint_of(checkpoint, config)
    path = place_for_answers(output or wanted, fingerprint, others=output is None)
    done = answered(path, fingerprint)
    if all(sample.id in done for sample in samples):
        predictions = gather(path, samples, fingerprint)
    else:
        if config.on_bad_video == "error":
            check_videos(samples)
        policy = load_policy(checkpoint, getattr(torch, DTYPES[config.precision]), distributed.device())
        check_output(path)
        if rank == 0:
            notes = coordinates_note(policy, config) + settings_note(checkpoint, config)
            print(notes, end="", file=sys.stderr)
        with contextlib.closing(open_clips(config, policy.size_factor)) as clips:
            predictions = decode_split(policy, samples, clips, config, path, fingerprint)
    if rank == 0:
        report_answers(predictions, len(done), path)
    return samples, predictions


def find_checkpoint(places: list[str], settings: list[str]) -> tuple[str, Path, Config]:
    """RUN, RUN/checkpoint_50, or CHECKPOINT CONFIG -> the checkpoint, the file for its answers, the settings.

    A checkpoint with a CONFIG gets a folder beside the config's output_dir, where another run lives, with the
    name of the run it comes from, or its own.
    """
    if len(places) == 2:
        path, config = Path(places[0]).resolve(), load_config(places[1], settings)
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
    rank, _ = distributed.join()
    if config.toy:
        if rank == 0:
            toy.make_world(config.videos)
        distributed.wait()
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    if rank == 0:
        counts = count_sentences(samples, report)
        print(f"{annotations}: {counts}\n{format_report(report)}", file=sys.stderr)
    return samples, report


def check_output(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises OSError, before hours of decoding, where that
    or the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


if __name__ == "__main__":
    run_script(
        lambda: main(sys.argv[1:]),
        "standard output",
        "free some space, or choose another place with --output",
        "stopped: the answers so far are kept; start again to go on",
    )
