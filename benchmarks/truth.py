"""Which spans in whole steps stand best for true spans? m_tIoU and m_vIoU (native) of three rules.

    python benchmarks/truth.py                                        8,956 made-up VidSTG-like sentences
    python benchmarks/truth.py configs/vidstg.yaml [key=value ...]    the held-out split of a configuration

sampled: a step belongs to the truth when the frame that is sampled for it does (the rule up to 2026-11).
taught: the nearest step edges (Sample.truth). best: the maximum over all spans in whole steps.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import Config, load_config
from data import load_samples
from metrics import native_scores, summarize, tube_from_answer, whole_step_scores
from prompts import TextFormat, truth_answer
from samples import Sample, Track

RATES = {30000 / 1001: 0.55, 30.0: 0.2, 25.0: 0.12, 24.0: 0.05, 24000 / 1001: 0.05, 15.0: 0.03}


def made_up_samples(count: int, rng: np.random.Generator) -> list[Sample]:
    """Lengths as in VidSTG's test split: events 3.7 s in the median, 39.8 s at 95 %, 9 % below 1 s; clips of
    19 s in the median. Boxes wander."""
    samples = []
    for n in range(count):
        fps, z = float(rng.choice(list(RATES), p=list(RATES.values()))), rng.normal()
        clip = np.clip(np.exp(rng.normal(np.log(19.3), 0.85)), 2, 180)
        event = min(clip, 3.7 * np.exp(z * (1.44 if z > 0 else 0.96)))
        frames, length = int(clip * fps), max(3, int(event * fps))
        first = int(rng.integers(0, frames - length + 1))
        centre = rng.uniform(0.3, 0.7, 2) + rng.normal(0, 0.004, (length, 2)).cumsum(axis=0)
        half = rng.uniform(0.05, 0.2, 2)
        boxes = np.hstack([(centre - half), (centre + half)]).clip(0, 1)
        sizes = {"width": 1280, "height": 720, "num_frames": frames, "fps": fps, "begin_frame": 0}
        truth = {"file_frames": frames, "first_frame": first, "stop_frame": first + length}
        samples.append(Sample(str(n), "", "it moves", **sizes, **truth, boxes=Track(first, boxes)))
    return samples


def by_sampled_frames(samples: list[Sample], text_format: TextFormat) -> dict:
    """The row of the former rule."""
    scores = []
    for sample in samples:
        grid = sample.grid(text_format.step_seconds)
        shown = [grid.sampled_frame(i) for i in range(grid.num_steps)]
        steps = [i for i, frame in enumerate(shown) if sample.first_frame <= frame < sample.stop_frame]
        steps = steps or [max(i for i, frame in enumerate(shown) if frame <= sample.first_frame)]
        answer = truth_answer(sample.truth(text_format.step_seconds, (steps[0], steps[-1])), (1000, 1000))
        scores.append(native_scores(tube_from_answer(answer, sample, text_format, (1000, 1000)), sample))
    return summarize(scores)


def main(arguments: list[str]) -> None:
    places, settings = ([w for w in arguments if ("=" in w) == wanted] for wanted in (False, True))
    config = load_config(places, settings) if places else Config()
    samples = made_up_samples(8956, np.random.default_rng(config.seed))
    if places:
        samples, _ = load_samples(config.dataset, config.eval_annotations, config.videos, config.vidor)
    for unit in ("frame", "second"):
        text_format = dataclasses.replace(config.text_format, time_unit=unit)
        start = time.process_time()
        rows = {name: row["native"] for name, row in whole_step_scores(samples, text_format).items()}
        seconds = time.process_time() - start
        rows = {
            "sampled": by_sampled_frames(samples, text_format),
            "taught": rows["taught"],
            "best": rows["best"],
        }
        shown = ", ".join(f"{name} {row['m_tIoU']:.2f} / {row['m_vIoU']:.2f}" for name, row in rows.items())
        what = f"{len(samples)} sentences, steps of {text_format.step_seconds:g} s"
        print(f"{what}: {shown} ({seconds:.0f} CPU seconds)")


if __name__ == "__main__":
    main(sys.argv[1:])
