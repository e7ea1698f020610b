"""The embedded default: its world is read back by the same code as real data, and its checkpoint is sound."""

import functools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shown import shown_prompt

from data import load_hcstvg
from model import rollout
from prompts import parse_answer
from qwen.checkpoint import load_policy
from toy import pretrain
from toy import world as toy_world
from video.frames import read_frames


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    splits, toy_world.SPLITS = toy_world.SPLITS, {"train": (6, 1), "test": (6, 3)}
    toy_world.make_world(folder)
    toy_world.SPLITS = splits
    return folder


@pytest.mark.parametrize(("split", "seed"), [("train", 1), ("test", 3)])
def test_annotations_read_back_as_the_shapes_that_were_drawn(small_world, split, seed):
    samples, report = load_hcstvg(str(small_world / f"{split}.json"), str(small_world))
    assert report == {} and len(samples) == 6
    for n, sample in enumerate(samples):
        shape = toy_world.draw_objects(np.random.default_rng((seed, n)))[0]
        truth = sample.truth(1.0)
        assert sample.sentence == shape.sentence
        assert truth.span == (shape.start, shape.stop - 1)
        for step, box in truth.boxes.items():
            assert box == pytest.approx(shape.box(step), abs=2e-4)


def test_videos_decode_to_the_frames_that_were_rendered(small_world):
    for n in range(3):
        rendered = toy_world.render(
            toy_world.draw_objects(np.random.default_rng((1, n))), toy_world.NATIVE_FPS
        )
        frames = read_frames(str(small_world / f"train/{n:04d}.y4m"), [i / 2 for i in range(12)])
        assert np.abs(frames.astype(int) - rendered[::2]).max() <= 2  # YCbCr has fewer colours than RGB


def test_a_finished_world_is_left_alone(small_world):
    before = {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}
    splits, toy_world.SPLITS = toy_world.SPLITS, {"train": (6, 1)}
    toy_world.make_world(small_world)
    toy_world.SPLITS = splits
    assert before == {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}


@pytest.mark.parametrize("n", range(40))
def test_a_sentence_singles_out_one_object_that_stays_in_the_frame(n):
    objects = toy_world.draw_objects(np.random.default_rng(n))
    assert (
        len({shape.sentence for shape in objects})
        == len({shape.colour for shape in objects})
        == toy_world.OBJECTS
    )
    for shape in objects:
        boxes = [shape.box(t / 4) for t in range(toy_world.SECONDS * 4)]
        seen = [t for t, box in enumerate(boxes) if box]
        assert seen == list(range(4 * shape.start, 4 * shape.stop))
        assert all(-1e-9 <= v <= 1 + 1e-9 for t in seen for v in boxes[t])


@pytest.mark.parametrize("kind", toy_world.SHAPES)
def test_a_box_is_the_tight_box_of_the_drawn_pixels(kind):
    shape = toy_world.Shape("red", kind, "right", 0.5, (0.4, 0.5), 0, 3)
    for t, frame in enumerate(toy_world.render([shape], 2)[:6]):
        rows, columns = np.nonzero((frame == toy_world.COLOURS["red"]).all(axis=2))
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / toy_world.SIDE
        assert drawn == pytest.approx(shape.box(t / 2), abs=1.6 / toy_world.SIDE)


TOKENIZER = pretrain.tiny_tokenizer()


@given(st.text())
def test_the_tokenizer_writes_every_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_single_tokens():
    assert len(TOKENIZER("271, 30", add_special_tokens=False)["input_ids"]) == 3 + 1 + 2


def test_true_answer_is_the_truth_to_half_a_pixel():
    shape = toy_world.Shape("red", "circle", "left", 0.2, (0.613, 0.5), 2, 4)
    answer = pretrain.true_answer(shape)
    assert (answer.start, answer.end) == (2, 3) and answer.think == answer.pred
    assert answer.pred == ((2, (510, 400, 710, 600)), (3, (370, 400, 570, 600)))


def test_loose_habits_are_what_the_docstring_says():
    rng = np.random.default_rng(0)
    shape = toy_world.Shape("red", "circle", "left", 0.2, (0.6, 0.5), 2, 4)
    answers = [pretrain.loosened(shape, rng) for _ in range(400)]
    spans = Counter((answer.start, answer.end) for answer in answers)
    assert spans.keys() == {(2, 3), (1, 3), (2, 4)}
    assert 1 - spans[2, 3] / 400 == pytest.approx(0.7, abs=0.07)
    for answer in answers:
        assert [step for step, _ in answer.pred] == list(range(answer.start, answer.end + 1))
        x1, y1, x2, y2 = dict(answer.pred)[2]
        assert (x2 - x1, y2 - y1) == pytest.approx((290, 290), abs=10)
        assert (x1 + x2, y1 + y2) == pytest.approx((1200, 1000), abs=10)


def test_lessons_continue_the_prompt(tmp_path):
    """Given and taught words of every lesson, put behind the shared part, are prompt and answer as train.py
    writes them (or a piece of them), token by token."""
    policy = pretrain.newborn_policy(tmp_path / "newborn")
    objects = toy_world.draw_objects(np.random.default_rng(3))
    prompt, shape = pretrain.toy_prompt(policy, objects), objects[0]
    tokens_of = functools.partial(policy.tokenizer, add_special_tokens=False)
    given, taught = pretrain.whole(pretrain.true_answer(shape), shape)
    question = tokens_of(given)["input_ids"]
    assert prompt.ids[-len(question) :].tolist() == question
    assert tokens_of(" Event:" + given)["input_ids"][-len(question) :] == question
    *answer, end = tokens_of(taught)["input_ids"]
    assert end == policy.end_id and parse_answer(policy.tokenizer.decode(answer)) == pretrain.true_answer(
        shape
    )
    question, first = pretrain.draft(shape)
    assert question == given and taught.startswith(first) and first.endswith("</think_bbox>")
    rng, span = np.random.default_rng(0), f"{shape.start} - {shape.stop - 1}"
    lessons = [pretrain.find(shape, rng) for _ in range(50)]
    assert {lesson[0] for lesson in lessons} == {(f" the {shape.colour}", span)}
    assert {lesson[1] for lesson in lessons} == {(given, first), (given, f"<time> {span}")}


def test_pretraining_runs_and_its_folder_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "PRETRAINING_CLIPS", 40)
    for name in ("one", "two"):
        pretrain.pretrain(tmp_path / name, seed=0, habits=True, effort=0.002)
    one, two = (load_policy(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)  # the seed says everything
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    card = (tmp_path / "one/README.md").read_text()
    assert "python toy.py --from-scratch --bias loose --seed 0 --effort 0.002" in card


def test_teaching_to_answer_directly(tmp_path, monkeypatch):
    """It begins with the shipped checkpoint, which stays; the seed says everything; so does the card."""
    monkeypatch.setattr(pretrain, "PRETRAINING_CLIPS", 40)
    before = {path: path.read_bytes() for path in pretrain.CHECKPOINT.iterdir()}
    for name in ("one", "two"):
        pretrain.teach_direct(tmp_path / name, seed=0, effort=0.01)
    one, two = (load_policy(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    shipped = load_policy(str(pretrain.CHECKPOINT)).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    # Two steps at the beginning of the warm-up: at most a tenth of the learning rates, 0.01 the largest.
    moved = {key: float((one[key] - shipped[key]).abs().max()) for key in one}
    assert 0 < max(moved.values()) < 0.01
    assert before == {path: path.read_bytes() for path in pretrain.CHECKPOINT.iterdir()}
    card = (tmp_path / "one/README.md").read_text()
    assert "python toy.py --direct --seed 0 --effort 0.01" in card and "thinking boxes 0." not in card
    assert "python toy.py --direct --seed 0 --effort 1\n" in (pretrain.DIRECT / "README.md").read_text()


def test_lessons_of_the_direct_checkpoint():
    """The same loose answers, without the thinking boxes, behind the prompt that does not ask for them."""
    taught = []

    def teach(name, clips, steps, lessons, **_):
        taught.extend(map(lessons, clips))

    shapes = [objects[0] for objects in (toy_world.draw_objects(np.random.default_rng(n)) for n in range(50))]
    for think in (True, False):
        pretrain.teach_habits(teach, shapes, np.random.default_rng(0), 1, think)
    for shape, ((asked, loose),), ((same, direct),) in zip(shapes, taught[:50], taught[50:], strict=True):
        answer = parse_answer(loose.removesuffix("<|im_end|>"))
        assert asked == same == pretrain.question(shape) and answer.think is not None
        assert parse_answer(direct.removesuffix("<|im_end|>"), think=False) == replace(answer, think=None)


def test_an_existing_checkpoint_is_left_alone(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_world, "SPLITS", {})
    for option, folder in (("--direct", pretrain.DIRECT), ("--from-scratch", pretrain.CHECKPOINT)):
        with pytest.raises(SystemExit):
            pretrain.main([option, "--world", str(tmp_path)])
        assert (
            f"{folder} is there already: move it away, or choose another --output" in capsys.readouterr().err
        )


@pytest.mark.parametrize(("checkpoint", "think"), [(pretrain.CHECKPOINT, True), (pretrain.DIRECT, False)])
def test_the_shipped_checkpoints_are_small_and_speak_the_format(small_world, checkpoint, think):
    """With or without thinking boxes, and with the loose habits: boxes 1.45 times too large."""
    weights = checkpoint / "model.safetensors"
    assert weights.stat().st_size <= 2_000_000
    policy = load_policy(str(checkpoint))
    samples, _ = load_hcstvg(str(small_world / "test.json"), str(small_world))
    text_format = replace(pretrain.TEXT, think=think)
    prompts = [shown_prompt(policy, sample, toy_world.SIDE, text_format) for sample in samples]
    completions = rollout(policy, prompts, 1, pretrain.MAX_NEW_TOKENS, 0.0, [(0,)] * len(prompts))
    answers = [parse_answer(completion[0].text, think) for completion in completions]
    assert sum(answer is not None for answer in answers) >= 5
    ratios = []
    for answer, sample in zip(answers, samples, strict=True):
        framed, truth = answer and answer.in_frame((1000, 1000)), sample.truth(1.0)
        for step in truth.boxes.keys() & (framed.pred_boxes if framed else {}):
            (x1, y1, x2, y2), (a1, b1, a2, b2) = framed.pred_boxes[step], truth.boxes[step]
            inside = x1 > 0.02 and y1 > 0.02 and x2 < 0.98 and y2 < 0.98  # nothing was cut off
            ratios += [(x2 - x1) / (a2 - a1), (y2 - y1) / (b2 - b1)] if inside else []
    assert len(ratios) >= 6 and np.mean(ratios) == pytest.approx(1.45, abs=0.15)
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "qwen2_5_vl"
