"""What a configuration's data are like, before a run depends on it: `python data.py --check CONFIG`.

    python data.py --check configs/vidstg.yaml             annotations, answer lengths, headers of the videos
    python data.py --check configs/vidstg.yaml --decode    and every clip decoded (which fills frame_cache)
    python data.py --questions configs/closed_model.yaml   what to ask a chat model, one JSON object a line

For each split that the configuration names: sentences in the official file and here, each repair and drop by
its reason, the true answers' lengths in tokens against max_new_tokens, the best that answers on the grid of
steps can score, and what is wrong with the videos. Declarative and interrogative sentences of VidSTG are told
apart. Ends with exit code 1 where a video cannot be used, unless the configuration skips such videos.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from config import Config, ConfigError, load_config
from data import OFFICIAL_COUNTS, count_sentences, format_report, load_samples, missing_videos
from metrics import PROTOCOLS, format_table, grid_ceiling
from prompts import build_prompt, format_answer, truth_answer
from qwen.checkpoint import load_tokenizer
from runtime.files import ModelError, few
from samples import QUESTION_TYPES, Sample
from toy import world as toy_world
from video.frames import VideoError, check_header, frame_size, probe
from video.loader import Workers, open_loader

MOST = 10_000  # true answers that are counted in tokens; of a larger split so many at random
PERCENTILES = (50, 90, 95, 99, 100)
NOTE = "note: "  # before a problem that does not keep the video from being used
PATCH = 28  # pixels of a visual token of Qwen2.5-VL, for the size of frames where no model is loaded


def main(arguments: list[str]) -> None:
    """Exits with code 1 where a video cannot be used, unless on_bad_video: skip takes care of it."""
    parser = argparse.ArgumentParser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="CONFIG", help="look at the data of a configuration")
    what.add_argument("--questions", metavar="CONFIG", help="print what is asked about its held-out split")
    parser.add_argument("--decode", action="store_true", help="decode every clip, not the headers alone")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)  # settings may stand anywhere
    config = load_config(options.check or options.questions, options.settings)
    if options.questions:
        return print_questions(config)
    splits = [path for path in dict.fromkeys((config.train_annotations, config.eval_annotations)) if path]
    if not splits:
        raise ConfigError(f"{options.check}: names neither train_annotations nor eval_annotations")
    if config.toy:
        toy_world.make_world(config.videos)
    print(f"loading the tokenizer of {config.model}", file=sys.stderr)  # the hub, or that it is out of reach
    try:
        tokenizer, factor = load_tokenizer(config.model)
    except ModelError as error:
        if options.decode and config.frame_cache:  # its frames would be of a size that no model asks for
            raise
        tokenizer, factor = None, PATCH
        print(f"true answers: not counted in tokens ({error})\n")
    bad = sum([check_split(config, path, options.decode, tokenizer, factor) for path in splits])
    if bad and config.on_bad_video == "error":
        sys.exit(1)


def print_questions(config: Config) -> None:
    """One JSON object for each held-out sentence: what to show a chat model, what to ask it, and the id of
    its answer for `evaluate.py --predictions`."""
    samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)
    for sample in samples[: config.eval_limit or None]:
        begin, end = (
            frame / sample.fps for frame in (sample.begin_frame, sample.begin_frame + sample.num_frames)
        )
        size = (sample.width, sample.height)
        num_steps = sample.grid(config.text_format.step_seconds).num_steps
        scale = config.text_format.scale(size, size)
        prompt = build_prompt(sample.sentence, num_steps, scale, config.text_format)
        clip = {"video": sample.video, "begin": round(begin, 3), "end": round(end, 3)}  # seconds in the file
        print(json.dumps({"id": sample.id, **clip, "prompt": prompt}, ensure_ascii=False))


def check_split(config: Config, annotations: str, decode: bool, tokenizer, factor: int) -> int:
    """Print all about one split; returns the number of videos that cannot be used. tokenizer: of the model;
    None where it does not load. factor: pixels of a visual token."""
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    official = OFFICIAL_COUNTS.get((config.dataset, os.path.basename(annotations)))
    known = f"; the official file of this name has {official}" if official and not config.toy else ""
    print(f"{annotations}: {count_sentences(samples, report)}{known}")
    print(format_report(report, whole=True) + "\n")
    if config.answer_format != "boxes":
        print(f"true answers: not counted in tokens for answer_format: {config.answer_format}\n")
    elif tokenizer is not None:
        print(answer_lengths(config, samples, tokenizer, factor) + "\n")
    print(ceilings(config, samples) + "\n")
    missing = missing_videos(samples)
    gone = set(missing)
    present = [sample for sample in samples if sample.video not in gone]
    problems, count = check_clips(config, present, factor) if decode else check_headers(config, present)
    how = "decoded" if decode else "by their headers"
    print(f"{count} videos, {how}: {'' if problems or missing else 'all good'}")
    for problem, ids in problems.items():
        print(f"  {problem}")
        print(f"    {len(ids)} sentences: {few(ids)}")
    if missing:
        print(f"  {len(missing)} of {count + len(missing)} videos missing: {few(missing)}")
    print()
    return len(missing) + sum(not problem.startswith(NOTE) for problem in problems)


def kinds_of(samples: list[Sample]) -> dict[str, list[Sample]]:
    """All of them, and those of each question type that there is."""
    kinds = {kind: [s for s in samples if s.question_type == kind] for kind in QUESTION_TYPES}
    return {"all": samples} | {kind: some for kind, some in kinds.items() if some}


def answer_lengths(config: Config, samples: list[Sample], tokenizer, factor: int) -> str:
    """A table of how many tokens the true answers take, end token included. factor: pixels of a visual token,
    which coordinates: resized depend on."""
    chosen = samples
    if len(samples) > MOST:
        order = np.random.default_rng(0).choice(len(samples), MOST, replace=False)
        chosen = [samples[k] for k in sorted(order)]
    lengths = {}
    for sample in tqdm(chosen, desc="true answers", unit="answer", delay=2, leave=False):
        file_size = (sample.width, sample.height)
        scale = config.text_format.scale(frame_size(*file_size, config.max_side, factor), file_size)
        answer = truth_answer(sample.truth(config.text_format.step_seconds), scale, config.think)
        lengths[sample.id] = len(tokenizer(format_answer(answer), add_special_tokens=False)["input_ids"]) + 1
    limit = config.max_new_tokens
    title = "true answers, in tokens" if chosen is samples else f"{MOST} true answers, in tokens"
    lines = [f"{title:<30}{'N':>7}{'mean':>8}"]
    lines[0] += "".join(f"{f'{p} %':>8}" for p in PERCENTILES) + f"   above max_new_tokens {limit}"
    for kind, some in kinds_of(chosen).items():
        counts = np.array([lengths[sample.id] for sample in some])
        shares = np.percentile(counts, PERCENTILES, method="inverted_cdf")
        row = f"{kind:<30}{len(some):>7}{counts.mean():>8.0f}" + "".join(f"{n:>8.0f}" for n in shares)
        lines.append(f"{row}   {(counts > limit).mean():.1%}")
    return "\n".join(lines)


def ceilings(config: Config, samples: list[Sample]) -> str:
    """The table of the answers that say the truth as well as the grid of steps allows."""
    rows = {}
    for protocol, (kind, some) in itertools.product(PROTOCOLS, kinds_of(samples).items()):
        name = protocol if kind == "all" else f"{protocol} {kind}"
        rows[name] = grid_ceiling(some, config.text_format, protocol)
    return f"the best score in steps of {config.text_format.step_seconds:g} s\n{format_table(rows)}"


def check_headers(config: Config, samples: list[Sample]) -> tuple[dict[str, list[str]], int]:
    """problem -> ids of the sentences, of what stands in the headers; and the number of video files."""
    by_video = collections.defaultdict(list)
    for sample in samples:
        by_video[sample.video].append(sample)
    problems = collections.defaultdict(list)
    with contextlib.closing(Workers(max(1, config.video_workers), config.video_timeout)) as workers:
        jobs = {video: workers.submit(probe, video) for video in by_video}
        for video, job in tqdm(jobs.items(), desc="headers", unit="video", delay=2, leave=False):
            try:
                header = job.result()
                for sample in by_video[video]:
                    if check_header(sample, header):
                        note = f"{NOTE}{video}: ends at {header.seconds:.2f} s, what exists is used"
                        problems[note].append(sample.id)
            except VideoError as error:
                problems[str(error)] += [sample.id for sample in by_video[video]]
    return problems, len(by_video)


def check_clips(config: Config, samples: list[Sample], factor: int) -> tuple[dict[str, list[str]], int]:
    """The same from decoding the clips."""
    by_clip = collections.defaultdict(list)
    for sample in samples:
        by_clip[sample.video, sample.begin_frame, sample.num_frames].append(sample)
    firsts = [some[0] for some in by_clip.values()]
    config = dataclasses.replace(config, on_bad_video="error")  # errors are to be caught here
    problems = collections.defaultdict(list)
    notes: list[str] = []
    with contextlib.closing(open_loader(config, factor, say=notes.append)) as clips:
        for k, sample in enumerate(tqdm(firsts, desc="clips", unit="clip", delay=2, leave=False)):
            clips.prefetch(firsts[k : k + 2 * max(1, config.video_workers)])
            same = [s.id for s in by_clip[sample.video, sample.begin_frame, sample.num_frames]]
            try:
                found, expected = len(clips.frames(sample)), sample.grid(1 / config.fps).num_steps
                if found < expected:
                    notes.append(f"{sample.video}: {found} of {expected} frames exist and are used")
                while notes:
                    problems[NOTE + notes.pop()] += same
            except VideoError as error:
                problems[str(error)] += same
    return problems, len({sample.video for sample in samples})
