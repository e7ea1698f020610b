"""Check annotations and videos before training.

    python -m lab.check_data configs/vidstg.yaml             annotations, true answers, headers of the videos
    python -m lab.check_data configs/vidstg.yaml --decode    and every clip, which fills frame_cache

The exit code is 1 if a video cannot be used and on_bad_video is error.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import Counter

import numpy as np
from tqdm import tqdm

from config import Config, load_config
from data import DROPS, count_sentences, format_report, load_samples, missing_videos
from metrics import format_table, whole_step_scores
from prompts import format_answer, truth_answer
from qwen.checkpoint import load_tokenizer
from runtime.files import ModelError, few, run_script
from samples import Sample
from toy import world
from video.frames import VideoError, check_header, clip_times, frame_size, probe
from video.loader import FrameLoader

# Sentences in the official files (papers and repositories of the data sets).
OFFICIAL = {"train.json": 4500, "test.json": 1160, "train_v2.json": 10131, "val_v2.json": 2000}
OFFICIAL |= {"train_annotations.json": 80684, "val_annotations.json": 8956, "test_annotations.json": 10303}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--decode", action="store_true", help="decode every clip, which fills frame_cache")
    options = parser.parse_intermixed_args(arguments)  # settings may stand anywhere
    config = load_config(options.config, options.settings)
    if config.toy:
        world.make_world(config.videos)
    try:
        tokenizer, factor = load_tokenizer(config.model)
    except ModelError as error:
        print(f"no tokens are counted and no frames cached: {error}; offline, give model=FOLDER\n")
        tokenizer, factor, config.frame_cache = None, 28, ""  # 28 as Qwen2.5-VL; another model may differ
    splits = [path for path in dict.fromkeys((config.train_annotations, config.eval_annotations)) if path]
    bad = [check_split(config, path, options.decode, tokenizer, factor) for path in splits or [""]]
    if any(bad) and config.on_bad_video == "error":
        sys.exit(1)


def check_split(config: Config, annotations: str, decode: bool, tokenizer, factor: int) -> bool:
    """Print all about one split; returns whether a video cannot be used. factor: pixels of a visual token."""
    samples, report = load_samples(config.dataset, annotations, config.videos, config.vidor)
    total = len(samples) + sum(len(report.get(finding, [])) for finding in DROPS)
    official = OFFICIAL.get(os.path.basename(annotations), total)
    # Your own file may have the same name, but hardly almost the same size.
    differs = f"; the official file has {official}" if 0 < abs(total / official - 1) < 0.1 else ""
    print(f"{annotations}: {count_sentences(samples, report)}{differs}\n{format_report(report, True)}\n")
    if tokenizer:
        print(answer_lengths(config, samples, tokenizer, factor) + "\n")
    scores = whole_step_scores(samples, config.text_format)
    table = format_table({name: rows["native"] for name, rows in scores.items()})
    print(f"answers in whole steps of {config.text_format.step_seconds:g} s\n{table}\n")
    present = [sample for sample in samples if os.path.isfile(sample.video)]
    bad = check_videos(config, present, factor, decode)
    if missing := missing_videos(samples):
        bad[f"{len(missing)} videos missing: {few(missing)}"] = len(samples) - len(present)
    print(f"{len({sample.video for sample in samples})} videos: {'' if bad else 'all usable'}")
    print("".join(f"{count:>9} sentences  {problem}\n" for problem, count in bad.items()))
    return bool(bad)


def answer_lengths(config: Config, samples: list[Sample], tokenizer, factor: int) -> str:
    """How many tokens the true answers take, end token included; of a large split, of some 2,000 of them."""
    counts, step_seconds, limit = [], config.text_format.step_seconds, config.max_new_tokens
    some = samples[:: -(-len(samples) // 2000)]
    for sample in tqdm(some, desc="true answers", delay=2, leave=False, disable=None):
        size = (sample.width, sample.height)
        scale = config.text_format.scale(frame_size(*size, config.max_side, factor), size)
        text = format_answer(truth_answer(sample.truth(step_seconds), scale, config.think))
        counts.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)
    half, most, longest = np.percentile(counts, (50, 95, 100), method="inverted_cdf").tolist()
    above = f"{np.mean(np.array(counts) > limit):.1%} above max_new_tokens {limit}"
    return f"tokens of the true answers: median {half}, 95 % up to {most}, longest {longest}; {above}"


def check_videos(config: Config, samples: list[Sample], factor: int, decode: bool) -> Counter:
    """What keeps videos from being used -> number of sentences. Says on stderr which videos end early, and
    how many have another number of frames than annotated."""
    samples = sorted(samples, key=lambda s: (s.video, s.begin_frame, s.num_frames))  # clip by clip
    step_seconds, bad, by_time = config.text_format.step_seconds, Counter(), set()
    config = dataclasses.replace(config, on_bad_video="error", video_workers=max(1, config.video_workers))
    with contextlib.closing(FrameLoader(config, factor)) as loader:
        headers = {path: loader.workers.submit(path, probe, path) for path in {s.video for s in samples}}
        for k, sample in enumerate(tqdm(samples, desc="videos", delay=2, leave=False, disable=None)):
            try:
                header, times = headers[sample.video].result(), clip_times(sample, config.fps)
                shown = check_header(sample, header, times)
                if decode:
                    loader.prefetch(samples[k : k + 8 * config.video_workers])
                    loader.frames(sample)
                if header.frames != sample.file_frames:
                    by_time.add(sample.video)
                if shown < len(times):
                    if sample.truth(step_seconds).before(config.text_format.num_steps(shown)) is None:
                        raise VideoError(
                            f"{sample.video}: ends before the event begins; fetch the whole video"
                        )
                    loader.say_once(f"{sample.video}: ends early; what exists is used")
            except VideoError as error:
                bad[str(error)] += 1
        if by_time:
            videos = f"{len(by_time)} videos have another number of frames than annotated"
            loader.say(f"{videos}, and are read by their own clock: {few(sorted(by_time))}")
    return bad


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), "standard output")
