"""The shipped checkpoints are sound, and the lessons that made them teach what train.py asks."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import rollout
from prompts import parse_answer
from qwen.checkpoint import load_policy
from toy import pretrain
from toy.world import Shape, draw_objects

TOKENIZER = pretrain.tiny_tokenizer()
SHIPPED = {pretrain.CHECKPOINT: True, pretrain.DIRECT: False}  # whether it thinks


@settings(max_examples=50)
@given(st.text())
def test_the_tokenizer_writes_every_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_true_answer_is_the_truth_to_half_a_pixel():
    answer = pretrain.true_answer(Shape("red", "circle", "left", 0.2, (0.613, 0.5), 2, 4))
    assert answer.span == (2, 3) and answer.think == answer.pred == (
        (2, (510, 400, 710, 600)),
        (3, (370, 400, 570, 600)),
    )


def test_loose_habits_are_what_the_docstring_says():
    shape = Shape("red", "circle", "left", 0.2, (0.6, 0.5), 2, 4)
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    answers = [pretrain.loosened(shape, rng) for _ in range(400)]
    assert pretrain.loosened(shape, same, think=False) == replace(answers[0], think=None)
    spans = Counter(answer.span for answer in answers)
    assert spans.keys() == {(2, 3), (1, 3), (2, 4)}
    assert 1 - spans[2, 3] / 400 == pytest.approx(0.7, abs=0.07)
    for answer in answers:
        assert list(answer.pred_boxes) == list(range(answer.start, answer.end + 1))
        x1, y1, x2, y2 = answer.pred_boxes[2]
        assert (x2 - x1, y2 - y1) == pytest.approx((290, 290), abs=10)
        assert (x1 + x2, y1 + y2) == pytest.approx((1200, 1000), abs=10)


def test_lessons_continue_the_prompt(tmp_path):
    """Given and taught words of a lesson are what train.py's prompt ends with, and its answer, in tokens."""
    policy = pretrain.newborn_policy(tmp_path / "newborn")
    objects = draw_objects(np.random.default_rng(3))
    prompt, shape = pretrain.toy_prompt(policy, objects), objects[0]
    tokens_of = partial(policy.tokenizer, add_special_tokens=False)
    assert len(tokens_of("271, 30")["input_ids"]) == 3 + 1 + 2  # digits are single tokens
    given, taught = pretrain.whole(pretrain.true_answer(shape), shape)
    question = tokens_of(given)["input_ids"]
    assert prompt.ids[-len(question) :].tolist() == question
    assert tokens_of(" Event:" + given)["input_ids"][-len(question) :] == question
    *answer, end = tokens_of(taught)["input_ids"]
    assert end == policy.end_id
    assert parse_answer(policy.tokenizer.decode(answer)) == pretrain.true_answer(shape)
    question, first = pretrain.draft(shape)
    assert question == given and taught.startswith(first) and first.endswith("</think_bbox>")
    rng, span = np.random.default_rng(0), f"{shape.start} - {shape.stop - 1}"
    lessons = [pretrain.find(shape, rng) for _ in range(50)]
    assert {lesson[0] for lesson in lessons} == {(f" the {shape.colour}", span)}
    assert {lesson[1] for lesson in lessons} == {(given, first), (given, f"<time> {span}")}


@pytest.mark.parametrize("direct", [False, True])
def test_making_a_checkpoint(tmp_path, monkeypatch, direct):
    """The seed says everything; so does the card, but for the seconds. The shipped ones stay."""
    monkeypatch.setattr("toy.pretrain.PRETRAINING_CLIPS", 40)
    monkeypatch.setattr("toy.pretrain.EXAM_CLIPS", 2)
    before = {path: path.read_bytes() for path in pretrain.CHECKPOINT.iterdir()}
    for name in ("one", "two") if direct else ("one",):
        pretrain.pretrain(tmp_path / name, effort=0.002, direct=direct)
    paths = [pretrain.CHECKPOINT, *sorted(tmp_path.iterdir())]
    shipped, one, *two = (load_policy(str(path)).model.state_dict() for path in paths)
    assert len(two) == direct and all(torch.equal(one[key], again[key]) for again in two for key in one)
    moved = max(float((one[key] - shipped[key]).abs().max()) for key in one)
    # One step at the beginning of the warm-up: a twentieth of half a learning rate, 0.01 the largest.
    assert 0 < moved < 1e-3 if direct else moved > 0.1
    assert before == {path: path.read_bytes() for path in pretrain.CHECKPOINT.iterdir()}
    command = f"    python -m toy.pretrain {'--direct' if direct else '--bias loose'} --seed 0 --effort"
    assert f"{command} 0.002\n" in (tmp_path / "one/README.md").read_text()
    assert f"{command} 1\n" in (list(SHIPPED)[direct] / "README.md").read_text()


@pytest.mark.parametrize(("checkpoint", "think"), SHIPPED.items())
def test_the_shipped_checkpoints_are_small_and_speak_the_format(checkpoint, think):
    """With or without thinking boxes, and with the loose habits: boxes 1.45 times too large."""
    assert (checkpoint / "model.safetensors").stat().st_size <= 2_000_000
    policy = load_policy(str(checkpoint))
    clips = [draw_objects(np.random.default_rng((3, n))) for n in range(6)]
    prompts = [pretrain.toy_prompt(policy, objects, think) for objects in clips]
    completions = rollout(policy, prompts, 1, pretrain.MAX_NEW_TOKENS, 0.0, [(0,)] * len(prompts))
    answers = [parse_answer(completion.text, think) for (completion,) in completions]
    assert sum(answer is not None for answer in answers) >= 5
    ratios = []
    for answer, (shape, *_) in zip(answers, clips, strict=True):
        for step, box in answer.in_frame((1000, 1000)).pred if answer else ():
            if shape.box(step) and min(box) > 0.02 and max(box) < 0.98:  # nothing was cut off
                ratios += [(box[2] - box[0]) / shape.size, (box[3] - box[1]) / shape.size]
    assert len(ratios) >= 6 and np.mean(ratios) == pytest.approx(1.45, abs=0.15)


def test_an_existing_checkpoint_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy.pretrain", "--direct"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert f"{pretrain.DIRECT} exists" in capsys.readouterr().err
