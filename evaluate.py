"""Answer a held-out split with a model and print the paper's row (Tables 1-4), or score saved answers.

    python evaluate.py RUN                                     a run folder of train.py, on its held-out split
    python evaluate.py RUN/checkpoint_50                       an earlier checkpoint of that run
    python evaluate.py CHECKPOINT CONFIG key=value ...         any Qwen-VL, on the held-out split of a config
    torchrun --nproc_per_node=8 evaluate.py ...                the same answers from eight GPUs
    python evaluate.py --predictions FILE --data CONFIG        saved answers; needs neither model nor videos

CONFIG may be several files, laid over one another as in train.py.

A run's answers go to RUN/predictions.jsonl (of an earlier checkpoint to predictions_of_checkpoint_50.jsonl),
those of CHECKPOINT CONFIG to a folder named after the config's output_dir and the checkpoint, or all to
--output FILE. Started again, evaluate.py decodes only what is missing. If that file holds answers made in
another way (other weights, settings or annotations), the new ones go to predictions.FINGERPRINT.jsonl.

Below the row (metrics.py) it prints what the final boxes gain over the thinking boxes and, if it has decoded
answers, what a video took (Table 9; set eval_batch=1 to answer one video at a time as the paper does).
"""

import contextlib
import dataclasses
import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

from config import DTYPES, Config, ConfigError, check_words, load_config
from runtime.files import DataError, check_first, run_script, write_jsonl

if __name__ == "__main__":  # a wrong setting is said before the imports below, which take seconds
    check_first(lambda: check_words(sys.argv[1:]))

import torch
from tqdm import tqdm

from data import DROPS, Report, check_videos, count_sentences, format_report, load_samples
from metrics import format_gain, format_table, score_answers, think_gain, tube_of
from model import make_prompt, rollout
from prompts import Answer
from qwen.checkpoint import Policy, load_policy
from rewards import score
from runtime import distributed
from runtime.logs import parse_report, peak_memory
from runtime.plugins import load_plugins, plugin_names, plugins_note
from runtime.predictions import (
    fingerprint_of,
    merge_rank_files,
    missing_samples,
    path_for_answers,
    rank_file,
    read_predictions,
    saved_answers,
)
from samples import Sample, Truth
from toy import world as toy_world
from video.loader import FrameLoader

WATCHED = 3  # sentences that `watch` answers


def answer_batch(
    policy: Policy, batch: list[tuple[int, Sample]], loader: FrameLoader, config: Config, count: int = 1
) -> list[dict]:
    """The model's answers to some samples, as lines of predictions.jsonl; greedy unless eval_temperature > 0.

    batch: each sample with its number in the split, from which its random numbers are drawn. count: of the
    answers to each. A sample whose video cannot be read (on_bad_video: skip) gets one empty answer, which is
    a failure. Raises RewardError.
    """
    prompts = {}
    for number, sample in batch:
        if (clip := loader.frames(sample)) is not None:
            prompts[number] = make_prompt(policy, sample, clip, config.text_format)
    keys = [(config.seed, number) for number in prompts]
    answers = rollout(
        policy, [*prompts.values()], count, config.max_new_tokens, config.eval_temperature, keys
    )
    completions, records = dict(zip(prompts, answers, strict=True)), []
    for number, sample in batch:
        scale = config.text_format.scale(*[(sample.width, sample.height)] * 2)
        scale = prompts[number].scale if number in prompts else scale
        truth = sample.truth(config.text_format.step_seconds)
        for answer in completions.get(number, [None]):
            text, outcome = "", {"unreadable": True}
            if answer:
                text, outcome = answer.text, {"length": len(answer.ids), "truncated": answer.truncated}
            record = {"id": sample.id, "sentence": sample.sentence}
            record |= {"question_type": sample.question_type} if sample.question_type else {}
            scored = score(text, truth, scale, config.rewards, config.think)
            record |= answer_record(text, scored.answer, truth, scale, config.think)
            records.append(record | {"rewards": scored.rewards} | outcome)
    return records


def watch(policy: Policy, samples: list[Sample], loader: FrameLoader, config: Config) -> list[dict]:
    """Sample num_generations answers to each of the first WATCHED samples, shared among the ranks. Returns
    them in order, as lines of predictions.jsonl, on every rank, without those of unreadable videos.

    All calls draw the same random numbers, and none of training's: what changes along a run is the model.
    """
    rank, world_size = distributed.init()
    size, records = -(-WATCHED // world_size), []
    own = [*enumerate(samples[:WATCHED])][rank * size : (rank + 1) * size]
    sampled = dataclasses.replace(config, eval_temperature=config.temperature)
    with distributed.unsharded(policy.model), distributed.errors_on_all_ranks():
        for first in range(0, len(own), config.rollout_batch):
            part = own[first : first + config.rollout_batch]
            records += answer_batch(policy, part, loader, sampled, config.num_generations)
    return [record for record in distributed.all_gather_list(records) if "unreadable" not in record]


def answer_record(
    text: str, answer: Answer | None, truth: Truth, scale: tuple[int, int], think: bool
) -> dict:
    """What predictions.jsonl and rollouts.jsonl say about an answer: its text, the truth in steps, and what
    was parsed, with boxes in [0, 1]."""
    framed = answer and answer.in_frame(scale)
    boxes = {str(step): list(box) for step, box in truth.boxes.items()}
    record = {"completion": text, "truth": {"span": list(truth.span), "boxes": boxes}}
    record |= {"scale": list(scale), "think": think, "span": answer and list(answer.span)}
    for name in ("think", "pred"):
        items = framed and getattr(framed, name)
        record[f"{name}_boxes"] = items and [[step, [round(v, 4) for v in box]] for step, box in items]
    return record


def decode_split(
    policy: Policy | None,
    samples: list[Sample],
    loader: FrameLoader | None,
    config: Config,
    path: Path,
    fingerprint: str,
    stop: distributed.Stop | None = None,
) -> list[dict] | None:
    """Decode what `path` does not hold yet, shared among the ranks. Returns the records of all samples, in
    order, on every rank, and leaves them in `path`; None if it was stopped.

    fingerprint: of fingerprint_of; other records in `path` do not count. policy, loader: None if nothing is
    missing. Every rank appends each batch to its own file beside `path`, so that a kill costs one batch at
    most. What a plug-in or a video raises on one rank is raised on all.
    """
    rank, world_size = distributed.init()
    missing = missing_samples(samples, merge_rank_files(path, samples, fingerprint))
    if rank == 0 and len(missing) < len(samples):
        print(f"{len(samples) - len(missing)} answers are in {path.parent}/ already", file=sys.stderr)
    own, size, part = missing[rank::world_size], config.eval_batch, rank_file(path, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"evaluate {path.stem}" + f" (rank 0 of {world_size})" * (world_size > 1)
    bar = tqdm(total=len(own), desc=name, unit="answer", disable=rank > 0 or not own)
    with distributed.errors_on_all_ranks(), bar:
        for first in range(0, len(own), size):
            loader.prefetch([s for _, s in own[first : first + 2 * size + config.video_workers]])
            records = answer_batch(policy, own[first : first + size], loader, config)
            write_jsonl([record | {"fingerprint": fingerprint} for record in records], part, append=True)
            bar.update(len(records))
            if stop and stop.asked:
                break
    if stop and stop.agreed():
        return None
    done = merge_rank_files(path, samples, fingerprint)
    return [done[sample.id] for sample in samples]


def score_predictions(predictions: list[dict], samples: list[Sample], config: Config) -> dict[str, dict]:
    """protocol -> the paper's row (metrics.score_answers).

    predictions: at most one for each sample, with "id" and "completion" (and "scale" for coordinates:
    resized, which depend on the model). A sample without one counts as a failure. Raises DataError for a
    prediction without a sample.
    """
    by_id = {prediction["id"]: prediction for prediction in predictions}
    for key in by_id.keys() - {sample.id for sample in samples}:
        raise DataError(f"prediction {key!r}: no such sentence in {config.eval_annotations}; name its split")
    tubes = (tube_of(by_id.get(sample.id), sample, config) for sample in samples)
    return score_answers(tubes, samples, config.text_format)


def load_split(config: Config, annotations: str) -> tuple[list[Sample], Report]:
    """The samples of a split, and what was repaired or dropped, which is also printed to stderr. Writes the
    toy world first, if it is asked for and not there."""
    rank, _ = distributed.init()
    if config.toy:
        if rank == 0:
            toy_world.make_world(config.videos)
        distributed.barrier()
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    if rank == 0:
        print(f"{annotations}: {count_sentences(samples, report)}\n{format_report(report)}", file=sys.stderr)
    return samples, report


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RUN | CHECKPOINT CONFIG ... | key=value")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these answers")
    parser.add_argument("--data", nargs="+", metavar="CONFIG", help="the configuration they belong to")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the answers go")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    options = parser.parse_intermixed_args(arguments)  # settings may stand anywhere
    words = [*options.words, *(options.data or [])]
    settings, places = ([w for w in words if ("=" in w) == wanted] for wanted in (True, False))
    if bool(options.predictions) != bool(options.data) or not places:
        parser.error("name a RUN, a CHECKPOINT and a CONFIG, or --predictions FILE --data CONFIG")
    if options.predictions and (options.output or not set(options.words) <= set(settings)):
        parser.error("--predictions takes neither a model nor --output")
    rank, _ = distributed.init()
    if options.predictions:
        config, cost = load_config(places, settings), None
        samples, predictions = answers_from_file(options.predictions, config)
    else:
        checkpoint, wanted, config = find_checkpoint(places, settings)
        samples = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
        fingerprint = fingerprint_of(checkpoint, config)
        path = path_for_answers(options.output or wanted, fingerprint)
        missing = missing_samples(samples, saved_answers(path, fingerprint))
        with open_checkpoint(checkpoint, config, samples if missing else []) as (policy, loader):
            start = time.perf_counter()
            predictions = decode_split(policy, samples, loader, config, path, fingerprint)
            cost = cost_of([predictions[n] for n, _ in missing], time.perf_counter() - start, config)
        if rank == 0:
            print(f"the answers are in {path}; {parse_report(predictions, config)}", file=sys.stderr)
    distributed.destroy()
    if rank:
        return
    rows, gain = score_predictions(predictions, samples, config), think_gain(predictions, samples, config)
    if options.json:
        print(json.dumps(rows | ({"think": gain} if gain else {}) | ({"cost": cost} if cost else {})))
        return
    print(format_table(rows))
    if gain:
        print(format_gain(gain))
    if cost:
        print(
            "per video: {seconds:.3g} s, {tokens:.0f} tokens, {batch} at a time; peak {peak_memory:.1f} GB"
            " ({answers} decoded; the paper's Table 9: 15.49 s, 24.2 GB on one GPU)".format(**cost)
        )


def answers_from_file(path: Path, config: Config) -> tuple[list[Sample], list[dict]]:
    """The samples of the held-out split, and the saved answers to them."""
    split, report = load_split(config, config.eval_annotations)
    samples = split[: config.eval_limit or None]
    unasked = {sample.id for sample in split[len(samples) :]}
    unasked.update(*(report.get(reason, []) for reason in DROPS))
    saved = read_predictions(path)
    predictions = [prediction for prediction in saved if prediction["id"] not in unasked]
    if distributed.init()[0] == 0:
        more = f"{len(saved) - len(predictions)} others are to dropped sentences, or beyond eval_limit"
        print(f"{len(predictions)} answers to {len(samples)} sentences; {more}", file=sys.stderr)
    return samples, predictions


def find_checkpoint(places: list[str], settings: list[str]) -> tuple[str, Path, Config]:
    """RUN, RUN/checkpoint_50, or CHECKPOINT CONFIG [CONFIG ...] -> the checkpoint, the file for its answers,
    the settings. Loads the plug-ins that the user names, which RUN/config.yaml cannot do. Raises ConfigError
    if RUN has no checkpoint, or is none, and UserError for a plug-in."""
    checkpoint = Path(places[0])
    if len(places) > 1:
        config, run = load_config(places[1:], settings), checkpoint.resolve().parent
        load_plugins(config.rewards, config.think)
        name = checkpoint.resolve().name
        if (run / "config.yaml").is_file():
            name = f"{run.name}_{name}".replace("_checkpoint", "")
        return places[0], Path(f"{Path(config.output_dir)}_{name}") / "predictions.jsonl", config
    if (checkpoint / "config.yaml").is_file():
        checkpoint /= "checkpoint"
    run = checkpoint.parent  # not output_dir: a run may have been moved
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{places[0]}: neither a run of train.py nor a checkpoint in one; add a CONFIG")
    if not checkpoint.is_dir():
        others = sorted(map(str, [*run.glob("*_[0-9]*/"), *run.parent.glob(f"{run.name}.[0-9]*/")]))
        raise ConfigError(f"{run} has no {checkpoint.name} yet; there is {', '.join(others) or 'no other'}")
    name = "predictions" if checkpoint.name == "checkpoint" else f"predictions_of_{checkpoint.name}"
    config = load_config(run / "config.yaml", settings)
    keys = {word.partition("=")[0] for word in settings}
    named = {name: 1 for name in plugin_names(config.rewards) if f"rewards.{name}" in keys}
    load_plugins(named, config.think)
    return str(checkpoint), run / f"{name}.jsonl", config


@contextlib.contextmanager
def open_checkpoint(
    checkpoint: str, config: Config, samples: list[Sample]
) -> Iterator[tuple[Policy | None, FrameLoader | None]]:
    """The policy, and the loader of the samples' videos, which must exist; (None, None) for no samples."""
    if not samples:
        yield None, None
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.on_bad_video == "error":
        check_videos(samples)
    policy = load_policy(checkpoint, getattr(torch, DTYPES[config.precision]), distributed.device())
    if distributed.init()[0] == 0:
        note = plugins_note(config.rewards, Path(checkpoint).parent / "config.yaml")
        print(note + settings_note(policy, checkpoint, config), end="", file=sys.stderr)
    with contextlib.closing(FrameLoader(config, policy.size_factor)) as loader:
        yield policy, loader


def coordinates_note(policy: Policy, config: Config, trains: bool = False) -> str:
    """A line if the checkpoint's family was pre-trained to write boxes in other coordinates, else ""."""
    learned, asked = policy.family.coordinates, config.coordinates
    if config.toy or asked == learned:
        return ""
    advice = f"unless it was trained for that, set coordinates={learned}"
    if trains:
        advice = f"training teaches it {asked}. Choose norm1000, which means the same for every video"
    note = f"note: {policy.family.name} is pre-trained with coordinates: {learned}, and asked for {asked}"
    return f"{note}: {advice}\n"


def settings_note(policy: Policy, checkpoint: str, config: Config) -> str:
    """A line for each setting in which a run's checkpoint was trained to see or to write something else; of a
    checkpoint that is no run's, coordinates_note."""
    try:
        trained = load_config(Path(checkpoint).resolve().parent / "config.yaml")
    except ConfigError:
        return coordinates_note(policy, config)
    note = ""
    for key in ("fps", "max_side", "time_unit", "coordinates", "think"):
        then, now = getattr(trained, key), getattr(config, key)
        if then != now:
            note += f"note: {checkpoint} was trained with {key}: {then}, and is asked with {now}\n"
    return note


def cost_of(decoded: list[dict], seconds: float, config: Config) -> dict | None:
    """What a video takes on one rank (STVG-o1, Table 9), from the records that the ranks have decoded in so
    many seconds; None for none. All ranks must call it. "tokens" is a mean and counts the end; "batch" is how
    many were decoded together; "peak_memory", in GB, is the largest of the ranks."""
    peak, (_, world_size) = distributed.all_reduce_max(peak_memory()), distributed.init()
    lengths = [record["length"] for record in decoded if "length" in record]
    if not lengths:
        return None
    share = -(-len(lengths) // world_size)  # of a rank
    cost = {"answers": len(lengths), "seconds": seconds / share, "tokens": sum(lengths) / len(lengths)}
    return cost | {"batch": min(config.eval_batch, share), "peak_memory": peak}


if __name__ == "__main__":
    stopped = "stopped: the answers so far are kept; start again to resume"
    run_script(lambda: main(sys.argv[1:]), "the file of answers", stopped)
