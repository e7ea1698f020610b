"""model.py against the slow way (one_by_one.py): one answer at a time, the whole sequence, no cache.

Its own foundation, the rotary positions, is checked first: against the figures of the transformers release
that the weights were trained with, and position by position.
"""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import conftest
import numpy as np
import pytest
import torch
from one_by_one import (
    KEYS,
    LENGTHS,
    SHAPES,
    answer_logits,
    assert_gradients_close,
    gradients_of,
    ids_of,
    is_sped_up,
    make_prompts,
    random_completions,
    slow_logprobs,
    stock,
    with_many_ends,
)
from shown import shown_prompt

from data import load_samples
from model import (
    completion_logprobs,
    encode_prompt,
    pack_completions,
    prefill,
    rollout,
    rope_positions,
    with_video_features,
)
from prompts import TextFormat
from qwen.checkpoint import load_policy
from runtime.files import ModelError
from video.frames import read_frames


def slow_positions(ids, video_id, blocks):
    """Position by position. blocks: for each one the temporal positions of its t slices, h and w."""
    positions, start, k, blocks = [], 0, 0, iter(blocks)
    while k < len(ids):
        if ids[k] != video_id:
            positions.append((start, start, start))
            start, k = start + 1, k + 1
            continue
        times, h, w = next(blocks)
        block = [(start + t, start + y, start + x) for t in times for y in range(h) for x in range(w)]
        positions += block
        start, k = 1 + max(map(max, block)), k + len(block)
    return [list(axis) for axis in zip(*positions, strict=True)]


def test_positions_of_the_release_that_the_weights_saw():
    """transformers 4.57: 40 frames at 2 fps of 336 x 196 (grid 20 x 14 x 24, merged by 2), then 14 text
    tokens: the text begins 39 after the video's first position, ends at 52, and the first answer token
    stands at 53."""
    ids = torch.tensor([7, 8, 9] + [1] * (20 * 7 * 12) + [5] * 14)
    positions = rope_positions(ids, 1, [(torch.arange(20) * 2.0).floor()], 7, 12)
    text = positions[:, -14:] - 3
    assert text[:, 0].tolist() == [39] * 3 and text[:, -1].tolist() == [52] * 3
    assert int(positions.max()) + 1 - 3 == 53
    assert positions[:, 3].tolist() == [3, 3, 3]  # first patch
    assert positions[:, 3 + 20 * 7 * 12 - 1].tolist() == [3 + 38, 3 + 6, 3 + 11]  # last patch


def test_positions_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        h, w, count = (int(n) for n in rng.integers(1, 6, 3))
        ids, blocks = [], []
        for _ in range(count):
            times = np.floor(np.arange(rng.integers(1, 7)) * rng.choice([0.5, 1, 4 / 3, 2, 4])).astype(int)
            blocks.append((times.tolist(), h, w))
            ids += [5] * int(rng.integers(1, 5)) + [1] * (len(times) * h * w)
        ids += [5] * int(rng.integers(0, 5))
        temporal = [torch.tensor(times, dtype=torch.float32) for times, _, _ in blocks]
        found = rope_positions(torch.tensor(ids), 1, temporal, h, w)
        assert found.tolist() == slow_positions(ids, 1, blocks)


@pytest.mark.parametrize("fps", [0.5, 3, 7, 12.5])
def test_positions_of_a_prompt(policy, fps):
    """Family by family, the time axis in exact fractions: t * tokens_per_second * 2 / fps, floored last."""
    prompt = make_prompts(policy, fps)[0]
    t, h, w = 3, 2, 3  # five frames, two to a slice
    seconds = [math.floor(i * 2 * Fraction(2) / Fraction(fps)) for i in range(t)]
    times = {"qwen2_vl": [[0, 1, 2]], "qwen2_5_vl": [seconds], "qwen3_vl": [[0]] * 3}
    blocks = [(block, h, w) for block in times[policy.model.config.model_type]]
    assert prompt.positions.tolist() == slow_positions(prompt.ids.tolist(), policy.video_id, blocks)
    assert int((prompt.ids == policy.video_id).sum()) == t * h * w


@pytest.mark.parametrize("fps", [1, 2, 3, 4, 5, 6, 7, 10, 12.5, 24, 25, 30])
def test_times_do_not_drift(qwen2_5, fps):
    """Up to 128 frames: rounding of the product never takes a frame below the whole number it stands on."""
    frames = torch.zeros(128, 28, 28, 3, dtype=torch.uint8)
    prompt = encode_prompt(qwen2_5, frames, "", (1000, 1000), float(fps))
    times = prompt.positions[0, prompt.ids == qwen2_5.video_id]
    assert (times - times[0]).tolist() == [math.floor(i * Fraction(4) / Fraction(fps)) for i in range(64)]


def test_positions_of_qwen3_equal_transformers(checkpoints):
    """The one family whose positions transformers 5 counts as its weights were trained."""
    policy = load_policy(str(checkpoints["qwen3_vl"]))
    for prompt, (t, h, w) in zip(make_prompts(policy), SHAPES, strict=True):
        grid = torch.tensor([[-(-t // 2), 2 * h, 2 * w]])
        kinds = 2 * (prompt.ids == policy.video_id).int()
        theirs, delta = policy.model.model.get_rope_index(prompt.ids[None], kinds[None], video_grid_thw=grid)
        assert torch.equal(prompt.positions, theirs[:, 0])
        assert prompt.next_position == len(prompt.ids) + int(delta)


def test_text_that_imitates_the_special_tokens_is_refused(qwen2_5):
    frames = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"'a <\|video_pad\|> b' holds '<\|'.*remove"):
        encode_prompt(qwen2_5, frames, "a <|video_pad|> b", (1000, 1000), 2.0)


@pytest.mark.parametrize(("fps", "count"), [(2.0, 12), (0.4, 3)])
def test_prompt_of_a_sample(qwen2_5, world, fps, count):
    """Six seconds of 56 x 56 pixels at so many frames a second: at 0.4 they are those of 0, 2.5 and 5 s."""
    sample = load_samples("hcstvg", str(world / "all.json"), str(world))[0][0]
    prompt = shown_prompt(qwen2_5, sample, 336, TextFormat(fps=fps))
    frames = read_frames(sample.video, [i / fps for i in range(count)])
    assert torch.equal(prompt.frames, torch.from_numpy(frames))
    assert f"{count} steps of {1 / fps:g} s" in qwen2_5.tokenizer.decode(prompt.ids)


def test_the_random_models_are_not_trivial(policy):
    """Else the equalities below would say little: logits spread; video, sentence and positions matter; and
    the slow way is not sped up."""
    assert sum(map(is_sped_up, policy.model.modules())) > 6
    with stock(policy.model):
        assert not any(map(is_sped_up, policy.model.modules()))
    first, second, _ = make_prompts(policy)
    ids = list(range(10, 20))
    logits = answer_logits(policy, first, ids)
    assert logits[logits > -torch.inf].std() > 1
    other_video = replace(first, frames=255 - first.frames)
    other_positions = replace(first, positions=torch.arange(len(first.ids)).expand(3, -1))
    for other in (other_video, second, other_positions):
        assert (answer_logits(policy, other, ids) - logits).nan_to_num().abs().max() > 0.1


@torch.no_grad()
def test_greedy_rollout_is_the_argmax_of_full_forwards(policy):
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    answers = rollout(policy, prompts, 1, 20, 0.0, KEYS)
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        best = answer_logits(policy, prompt, completion.ids).argmax(-1)
        assert completion.ids == best.tolist()
    assert len({len(completion.ids) for (completion,) in answers}) > 1  # some left the batch before others


@torch.no_grad()
def test_sampled_rollout_is_a_redraw_from_full_forwards(policy):
    """Token t of an answer is the first whose cumulative probability exceeds number t of its own stream."""
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    answers = rollout(policy, prompts, 5, 16, 0.8, KEYS)
    lengths = set()
    for key, prompt, group in zip(KEYS, prompts, answers, strict=True):
        for g, completion in enumerate(group):
            uniform = np.random.default_rng([len(key), *key, g]).random(16)
            probabilities = answer_logits(policy, prompt, completion.ids, 0.8).double().softmax(-1).numpy()
            redrawn = [int((p.cumsum() <= u).sum()) for p, u in zip(probabilities, uniform, strict=False)]
            assert completion.ids == redrawn
            ended = [token in policy.eos_ids for token in completion.ids]
            assert not any(ended[:-1]) and completion.truncated == (not ended[-1])
            assert ended[-1] or len(completion.ids) == 16
            lengths.add(len(completion.ids))
    assert len(lengths) > 4


def test_an_answer_depends_on_its_key_alone(policy):
    """Not on the others in the batch, their number, or that of its siblings."""
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    together = ids_of(rollout(policy, prompts, 4, 12, 1.0, KEYS))
    for prompt, key, group in zip(prompts, KEYS, together, strict=True):
        assert ids_of(rollout(policy, [prompt], 4, 12, 1.0, [key])) == [group]
        assert ids_of(rollout(policy, [prompt], 2, 12, 1.0, [key])) == [group[:2]]
    backwards = rollout(policy, prompts[::-1], 4, 12, 1.0, KEYS[::-1])
    assert ids_of(backwards) == together[::-1]
    other_keys = ids_of(rollout(policy, prompts, 4, 12, 1.0, [(1, *key[1:]) for key in KEYS]))
    assert all(a != b for a, b in zip(other_keys, together, strict=True))


def test_keys_of_different_length_differ(policy):
    """(0, 5) of an evaluation and (0, 5, 0) of a training step: for numpy [0, 5, 0] is [0, 5, 0, 0]."""
    prompt = make_prompts(policy)[0]
    short, long = (ids_of(rollout(policy, [prompt], 3, 12, 1.0, [key])) for key in ((0, 5), (0, 5, 0)))
    assert all(a != b for a, b in zip(short[0], long[0], strict=True))


def test_more_room_continues_the_same_answers(qwen2_5):
    prompts = make_prompts(qwen2_5)
    short, long = (ids_of(rollout(qwen2_5, prompts, 2, n, 1.0, KEYS)) for n in (6, 12))
    assert short == [[ids[:6] for ids in group] for group in long]


def test_both_end_tokens_end_an_answer(policy):
    """Nearly uniform sampling, 64 answers of up to 100 tokens: both end tokens come up, and end answers."""
    prompt = make_prompts(policy)[1]
    ends = policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(policy.eos_ids) == set(ends) and policy.end_id == ends[0]
    (answers,) = rollout(policy, [prompt], 64, 100, 100.0, [(5,)])
    for completion in answers:
        whole = completion.ids[-1] in ends
        assert completion.truncated == (not whole) and (whole or len(completion.ids) == 100)
        body = completion.ids[:-1] if whole else completion.ids
        assert not set(body) & set(ends) and completion.text == policy.tokenizer.decode(body)
    assert {completion.ids[-1] for completion in answers} >= set(ends)
    drawn = {token for completion in answers for token in completion.ids}
    assert len(drawn) > 0.9 * len(policy.tokenizer) and not drawn & set(policy.forbidden_ids)


def test_placeholders_have_no_probability(policy):
    """However much the model wants one: it is never sampled, and has no share where tokens are scored."""
    assert policy.tokenizer.convert_ids_to_tokens(policy.forbidden_ids) == [
        f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ]
    prompt = make_prompts(policy)[0]
    (greedy,) = rollout(policy, [prompt], 1, 1, 0.0, [(0,)])
    # Two that the prompt lacks become twins of the likeliest token, ten times as loud.
    with torch.no_grad():
        table = policy.model.get_input_embeddings().weight
        table[policy.forbidden_ids[2:4]] = 10 * table[greedy[0].ids[0]]
    (again,) = rollout(policy, [prompt], 1, 8, 0.0, [(0,)])
    assert again[0].ids[0] == greedy[0].ids[0] and not set(again[0].ids) & set(policy.forbidden_ids)
    allowed = sorted(set(range(len(policy.tokenizer))) - set(policy.forbidden_ids))
    batch = pack_completions(policy, [prompt], [[[token] for token in allowed]])
    with torch.no_grad():
        total = completion_logprobs(policy, batch, 1.0).exp().sum()
        batch.ids[:] = policy.forbidden_ids[3]
        none = completion_logprobs(policy, batch, 1.0).exp()
    assert total.item() == pytest.approx(1, abs=1e-5) and (none == 0).all()


def test_rollout_in_training_mode(policy):
    """With gradient checkpointing on it samples the same; the mode is as before afterwards."""
    policy, prompts = with_many_ends(policy), make_prompts(policy)
    policy.model.eval()
    expected = ids_of(rollout(policy, prompts, 3, 12, 1.0, KEYS))
    assert not policy.model.training
    policy.model.activation_checkpointing_enable()
    policy.model.train()
    assert ids_of(rollout(policy, prompts, 3, 12, 1.0, KEYS)) == expected
    assert all(module.training for module in policy.model.modules())


def test_generation_config_has_no_influence(qwen2_5):
    """The checkpoint says top_k 1 and a repetition penalty (conftest); without them nothing changes."""
    assert qwen2_5.model.generation_config.repetition_penalty == 1.05
    assert qwen2_5.model.generation_config.top_k == 1
    prompts = make_prompts(qwen2_5)
    sampled = rollout(qwen2_5, prompts, 4, 12, 1.0, KEYS)
    qwen2_5.model.generation_config.update(repetition_penalty=1.0, top_k=0, top_p=1.0, temperature=1.0)
    assert rollout(qwen2_5, prompts, 4, 12, 1.0, KEYS) == sampled


@pytest.mark.parametrize("way", ["float64", "float32", "checkpointing", "caches"])
def test_packed_gradients_equal_one_at_a_time(checkpoints, policy, way):
    """float64 as far as it goes: transformers' norms and rotary tables and our log-softmax are float32."""
    dtype = torch.float64 if way == "float64" else torch.float32
    policy = load_policy(str(checkpoints[policy.model.config.model_type]), dtype=dtype)
    prompts, completions = make_prompts(policy), random_completions(policy)
    slow = torch.cat(slow_logprobs(policy, prompts, completions, 0.9))
    weights = torch.randn(len(slow), generator=torch.Generator().manual_seed(0))
    (weights * slow).sum().backward()
    expected = gradients_of(policy)
    policy.model.zero_grad()

    caches = None
    if way == "checkpointing":
        policy.model.activation_checkpointing_enable()
    if way == "caches":  # each prompt by itself, sampled from in between, as with reuse_prompts
        caches = [prefill(policy, [prompt])[0] for prompt in prompts]
        assert rollout(policy, prompts, 2, 8, 1.0, KEYS, caches) == rollout(policy, prompts, 2, 8, 1.0, KEYS)
    policy.model.train()
    packed = pack_completions(policy, prompts, completions)
    logprobs = completion_logprobs(policy, packed, 0.9, caches, chunk=7)  # 43 tokens: the last is not full
    tolerance = 5e-6 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(logprobs[packed.mask], slow, rtol=0, atol=tolerance)
    assert (logprobs[~packed.mask] == 0).all()
    (weights * logprobs[packed.mask]).sum().backward()
    assert_gradients_close(gradients_of(policy), expected, tolerance)


def test_scoring_is_the_same_in_any_batch_and_chunk(policy):
    """Padding, batch mates and siblings change nothing."""
    prompts, completions = make_prompts(policy), random_completions(policy, LENGTHS)
    with torch.no_grad():
        together = pack_completions(policy, prompts, completions)
        values = completion_logprobs(policy, together, 1.0)[together.mask]
        chunked = completion_logprobs(policy, together, 1.0, chunk=5)[together.mask]
        alone = []
        for prompt, group in zip(prompts, completions, strict=True):
            for ids in group:
                alone += completion_logprobs(policy, pack_completions(policy, [prompt], [[ids]]), 1.0)
    torch.testing.assert_close(chunked, values, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(alone), values, rtol=0, atol=5e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_runs_once(policy, checkpointing):
    """For the samples, the scores and the reference; and all numbers are as if it ran each time."""
    policy = with_many_ends(policy)
    policy.model.model.visual.requires_grad_(False)
    reference = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))
    if checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    visits, others = [], []
    policy.model.model.visual.register_forward_hook(lambda *_: visits.append(1))
    reference.model.model.visual.register_forward_hook(lambda *_: others.append(1))
    weights = torch.randn(sum(map(sum, LENGTHS)), generator=torch.Generator().manual_seed(0))
    completions, found = random_completions(policy, LENGTHS), []
    for prompts in (make_prompts(policy), with_video_features(policy, make_prompts(policy))):
        before = len(visits)
        samples = ids_of(rollout(policy, prompts, 3, 12, 1.0, KEYS))
        batch = pack_completions(policy, prompts, completions)
        logprobs = completion_logprobs(policy, batch, 0.9)
        with torch.no_grad():
            again = completion_logprobs(reference, batch, 0.9)
        torch.testing.assert_close(again, logprobs, rtol=0, atol=1e-6)
        policy.model.zero_grad()
        (weights * logprobs[batch.mask]).sum().backward()
        found.append((samples, logprobs.detach(), gradients_of(policy), len(visits) - before, len(others)))
    each_time, once = found
    assert each_time[0] == once[0]
    torch.testing.assert_close(each_time[1], once[1], rtol=0, atol=1e-6)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert once[2].keys() == trained and not any("visual" in name for name in trained)
    assert_gradients_close(each_time[2], once[2], 1e-6)
    # Each time: in the rollout and in the scoring; of the reference. Once: before them.
    assert each_time[3:] == (2, 1) and once[3:] == (0, 1) and len(visits) == 3


def test_what_a_frozen_tower_saw(policy):
    """The features that transformers' own call gives for one video alone, level by level."""
    prompts = make_prompts(policy)
    assert with_video_features(policy, prompts) is prompts and prompts[0].features is None  # it is trained
    assert with_video_features(policy, []) == []
    policy.model.model.visual.requires_grad_(False)
    policy.model.model.visual.merger.requires_grad_(True)
    assert with_video_features(policy, prompts) is prompts  # in part
    policy.model.model.visual.requires_grad_(False)
    seen = with_video_features(policy, prompts)
    assert all(prompt.features is None for prompt in prompts)
    for prompt, (t, h, w) in zip(seen, SHAPES, strict=True):
        values, grid = policy.patches(prompt.frames)
        with torch.no_grad():
            out = policy.model.model.get_video_features(values, grid[None], return_dict=True)
        levels = [out.pooler_output[0], *(level[0] for level in getattr(out, "deepstack_features", []))]
        assert len(levels) == (2 if policy.family.name == "Qwen3-VL" else 1)
        assert prompt.features.shape == (len(levels), -(-t // 2) * h * w, 48)
        torch.testing.assert_close(prompt.features, torch.stack(levels), rtol=0, atol=5e-5)
        assert not prompt.features.requires_grad
    batch = pack_completions(policy, seen, random_completions(policy))
    with torch.no_grad():
        before = completion_logprobs(policy, batch, 1.0)
        for level in seen[0].features:  # each of them matters
            level.mul_(0)
            after = completion_logprobs(policy, batch, 1.0)
            assert (after[:3] - before[:3]).abs().max() > 0.01  # of the three answers to the first video
            torch.testing.assert_close(after[3:], before[3:], rtol=0, atol=1e-6)
            before = after


def test_levels_of_features_keep_their_order(checkpoints, tmp_path, monkeypatch):
    """The tiny Qwen3-VL has one level beside the last; here two, as the published ones have three."""
    monkeypatch.setitem(conftest.FAMILIES["qwen3_vl"][0], "deepstack_visual_indexes", [0, 1])
    policy = load_policy(str(conftest.save_checkpoint("qwen3_vl", tmp_path / "deep")))
    policy.model.requires_grad_(False)
    prompts, completions = make_prompts(policy), random_completions(policy, LENGTHS)
    seen = with_video_features(policy, prompts)
    assert [len(prompt.features) for prompt in seen] == [3, 3, 3]
    once, each_time, swapped = (
        completion_logprobs(policy, pack_completions(policy, shown, completions), 1.0)
        for shown in (seen, prompts, [replace(p, features=p.features[[0, 2, 1]]) for p in seen])
    )
    torch.testing.assert_close(once, each_time, rtol=0, atol=1e-6)
    assert (swapped - once).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_features_have_the_dtype_of_the_arithmetic(checkpoints, dtype, autocast):
    policy = replace(load_policy(str(checkpoints["qwen3_vl"]), dtype=dtype), autocast=autocast)
    policy.model.requires_grad_(False)
    assert with_video_features(policy, make_prompts(policy))[0].features.dtype == torch.bfloat16
