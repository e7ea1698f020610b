"""The truth through all that lies between an annotation and a score, for each family, system of coordinates
and unit of time. What must come out is computed a second time, from boxes and native frames, in loops."""

import itertools
import json

import numpy as np
import pytest
from shown import shown_prompt

from data import load_samples
from metrics import native_scores, tube_from_answer
from prompts import COORDINATES, TIME_UNITS, TextFormat, format_answer, parse_answer, truth_answer
from qwen.checkpoint import load_policy
from toy import world as toy_world

SIDES = {"qwen2_vl": (196, 112), "qwen2_5_vl": (196, 112), "qwen3_vl": (192, 128)}  # of 200 x 112


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two films of 6 s at 8 frames a second and 200 x 112 pixels: a box that moves and grows, from frame 11
    to 39, and one of two frames between the steps."""
    folder = tmp_path_factory.mktemp("films")
    still = toy_world.render(toy_world.draw_objects(np.random.default_rng(0)), 8)  # (48, 56, 56, 3)
    frames = still.repeat(2, 1).repeat(4, 2)[:, :, :200]
    records = {}
    for name, first, count in (("long.y4m", 11, 29), ("short.y4m", 13, 2)):
        toy_world.write_y4m(folder / name, frames, 8)
        bbox = [[10 + 3 * k, 20 + k, 41 + k, 33 + k] for k in range(count)]
        size = {"width": 200, "height": 112, "img_num": 48, "fps": 8}
        records[name] = {"caption": "it moves", "st_frame": first + 1, "bbox": bbox, **size}
    (folder / "all.json").write_text(json.dumps(records))
    return load_samples("hcstvg", str(folder / "all.json"), str(folder))[0]


def overlap(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def true_score(sample, seconds, scale):
    """(tIoU, vIoU) of the true answer in steps of so many seconds and integers of that scale."""
    per = round(seconds * 8)  # native frames in a step
    truth = range(sample.first_frame, sample.stop_frame)
    begin, stop = (
        min(range(0, 49, per), key=lambda edge, f=f: abs(edge - f)) for f in (truth[0], truth.stop)
    )
    steps = [*range(begin, stop, per)] or [truth[0] // per * per]  # by their first frames
    said, total = {}, 0.0
    for step in steps:
        frame = min(truth, key=lambda f: (abs(f - step), f))  # its own, or the nearest one of the truth
        said[step] = [round(v * s) / s for v, s in zip(sample.boxes[frame], scale * 2, strict=True)]
    answered = range(steps[0], min(steps[-1] + per, 48))
    for f in set(answered) & set(truth):
        left, share = f // per * per, f % per / per
        right = left + per if left + per in said else left  # held
        box = [a + share * (b - a) for a, b in zip(said[left], said[right], strict=True)]
        total += overlap(box, sample.boxes[f])
    union = len(set(answered) | set(truth))
    return len(set(answered) & set(truth)) / union, total / union


@pytest.mark.parametrize("family", SIDES)
@pytest.mark.parametrize(("coordinates", "unit"), [*itertools.product(COORDINATES, TIME_UNITS)])
def test_the_truth_comes_back(checkpoints, samples, family, coordinates, unit):
    policy = load_policy(str(checkpoints[family]))
    text_format = TextFormat(coordinates, unit)
    scale = {"norm1000": (1000, 1000), "resized": SIDES[family], "original": (200, 112)}[coordinates]
    for sample in samples:
        prompt = shown_prompt(policy, sample, 200, text_format)
        assert prompt.scale == scale
        text = format_answer(truth_answer(sample.truth(text_format.step_seconds), prompt.scale))
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        again = policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        answer = parse_answer(again)
        assert again == text and answer.think == answer.pred
        scores = native_scores(tube_from_answer(answer, sample, text_format, prompt.scale), sample)
        expected = true_score(sample, text_format.step_seconds, scale)
        assert (scores["tIoU"], scores["vIoU"]) == pytest.approx(expected, abs=1e-12)
        assert scores["failures"] == 0 and scores["vIoU"] > (0.6 if sample.id == "long.y4m" else 0.1)
