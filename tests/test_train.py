"""train.py: tiny runs, one update against loops over answers and tokens, and what bad input says."""

import copy
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from one_by_one import slow_logprobs
from shown import shown_prompt
from tiny_runs import assert_same, metrics_of, names, read_lines, weights_of
from tracks import track_of

import train
from config import load_config
from data import load_samples
from evaluate import watch
from model import Completion, completion_logprobs, pack_completions
from qwen.checkpoint import load_policy
from rewards import TERMS, WEIGHTS, score
from runtime.files import UserError
from runtime.run import global_batch
from video.frames import VideoError
from video.loader import FrameLoader

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("without_pictures")


def samples_of(config):
    return load_samples(config.dataset, config.train_annotations, config.videos)[0]


def prompts_of(policy, config):
    return [shown_prompt(policy, s, config.max_side, config.text_format) for s in samples_of(config)]


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_files_of_a_run(finished, taught):
    best = names(finished, "best")
    assert names(finished) - best - {"checkpoint_2", "predictions_2.jsonl"} == {
        *("config.yaml", "versions.json", "metrics.jsonl", "rollouts.jsonl", "watched.jsonl"),
        *("predictions_before.jsonl", "predictions.jsonl", "checkpoint", "summary.json"),
    }
    assert best in ({"best_2"}, {"best_4"})
    assert yaml.safe_load((finished / "config.yaml").read_text())["rewards"] == WEIGHTS
    versions = json.loads((finished / "versions.json").read_text())
    assert {"python", "torch", "transformers", "decord"} <= versions.keys()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {"before", "after", "reward", "warnings", "seconds"}
    assert summary["before"]["N"] == 6 and summary["before"]["m_vIoU"] > 5  # or all of this would mean little
    assert summary["before"] == json.loads((taught / "summary.json").read_text())["after"]

    phases = ["eval0", "grpo1", "grpo2", "eval2", "grpo3", "grpo4", "eval4"]
    assert [f"{line['phase']}{line['step']}" for line in metrics_of(finished)] == phases
    first, *_, last = metrics_of(finished, "grpo")
    assert {*TERMS, "clip_frac", "loss", "grad_norm", "truncated"} <= first.keys()
    assert summary["reward"] == {"first": first["reward"], "last": last["reward"]}
    assert first["kl"] == 0 and first["ratio_max"] == 1  # the policy is the reference, and the sampler
    assert last["kl"] > 0 and last["grad_norm"] > 0
    before, after = weights_of(taught / "checkpoint"), weights_of(finished / "checkpoint")
    assert max((before[name] - after[name]).abs().max() for name in before) > 5e-5


def test_rollouts_file(finished):
    """Four steps, two prompts, four answers each: advantages and means follow from what is written."""
    records = read_lines(finished / "rollouts.jsonl")
    order = [(step, k, g) for step in (1, 2, 3, 4) for k in (0, 1) for g in range(4)]
    assert [(r["step"], r["group"], r["generation"]) for r in records] == order
    groups = [records[k : k + 4] for k in range(0, 32, 4)]
    assert any(r["advantage"] for r in records)
    for group in groups:
        assert len({r["id"] for r in group}) == 1
        totals = np.array([r["rewards"]["total"] for r in group])
        expected = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-6)
        assert [r["advantage"] for r in group] == pytest.approx(expected.tolist(), abs=1e-9)
        for r in group:
            assert 1 <= r["length"] <= 72 and isinstance(r["truncated"], bool)
            assert (r["span"] is None) == (r["pred_boxes"] is None) and r["think_boxes"] is None
    for line in metrics_of(finished, "grpo"):
        step = [r for r in records if r["step"] == line["step"]]
        assert line["reward"] == pytest.approx(np.mean([r["rewards"]["total"] for r in step]), abs=1e-9)
        assert line["length"] == np.mean([r["length"] for r in step])


def test_watched_file(finished):
    """Four answers each to the first three sentences, five times: those that the weights of then give."""
    config, records = load_config(finished / "config.yaml"), read_lines(finished / "watched.jsonl")
    order = [(step, f"{k}.y4m") for step in range(5) for k in (0, 1, 2) for _ in range(4)]
    assert [(record["step"], record["id"]) for record in records] == order
    assert len({record["completion"] for record in records[:4]}) > 1
    for step, model in {0: config.model, 2: finished / "checkpoint_2", 4: finished / "checkpoint"}.items():
        policy = load_policy(str(model))
        again = watch(policy, samples_of(config), FrameLoader(config, policy.size_factor), config)
        assert [record | {"step": step} for record in again] == records[12 * step : 12 * step + 12]


def test_same_seed_same_run(grpo_config, finished, tmp_path):
    """Byte for byte; an earlier run makes room. Another seed is another run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    train.main([grpo_config(tmp_path)])
    assert_same(tmp_path / "run", finished)
    assert names(tmp_path / "run.1") == {"config.yaml"}
    train.main([grpo_config(tmp_path, seed=4, steps=1, eval_limit=1)])
    first, other = (read_lines(tmp_path / run / "rollouts.jsonl")[:8] for run in ("run.2", "run"))
    assert [r["completion"] for r in first] != [r["completion"] for r in other]


def test_settings_reach_the_step(tmp_path, grpo_config, taught):
    """Weights, unscaled advantages and the evaluation's temperature, from what the run wrote; every step
    draws its own answers, for the same prompts and weights."""
    weights = {"format": 1, "consistency": 2, "temporal": 3, "spatial": 0.5, "think": 0, "giou": 1, "l1": 0}
    changes = {"rewards": weights, "scale_rewards": False, "learning_rate": 0.0, "eval_temperature": 2.0}
    path = grpo_config(tmp_path, **changes, batch_size=6, steps=2, eval_every=0)
    train.main([path])
    records = read_lines(tmp_path / "run/rollouts.jsonl")
    truths = {sample.id: sample.truth(1.0) for sample in samples_of(load_config(path))}
    for r in records:
        terms = r["rewards"]
        total = terms["format"] + 2 * terms["consistency"] + 3 * terms["temporal"]
        assert terms["total"] == pytest.approx(total + 0.5 * terms["spatial_pred"], abs=1e-9)
        giou_alone = score(r["completion"], truths[r["id"]], weights={"l1": 0}, think=False).rewards
        assert terms["spatial_pred"] == giou_alone["spatial_pred"]
    pairs = np.array([(r["rewards"]["total"], r["advantage"]) for r in records])
    totals, advantages = pairs.T.reshape(2, -1, 4)
    assert advantages == pytest.approx(totals - totals.mean(1, keepdims=True), abs=1e-9)
    assert totals.std(1).max() > 0.1
    greedy, sampled = (read_lines(run / "predictions.jsonl") for run in (taught, tmp_path / "run"))
    assert [r["completion"] for r in greedy] != [r["completion"] for r in sampled]
    first, second = ([r["completion"] for r in records if r["step"] == step] for step in (1, 2))
    assert len(first) == 24 and sorted(first) != sorted(second)


def test_warm_up_and_weight_decay(tmp_path, grpo_config, taught):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient, and shrinks it by
    learning rate x decay: after one step of four of warm-up, by a quarter of both."""
    before, moves = weights_of(taught / "checkpoint"), {}
    for decay in (0.0, 10.0):
        path = grpo_config(tmp_path, steps=1, eval_limit=1, warmup_steps=4, weight_decay=decay)
        train.main([path, "learning_rate=4e-4"])
        after = weights_of(tmp_path / "run/checkpoint")
        moves[decay] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert moves[0.0].abs().max() == pytest.approx(1e-4, rel=0.02)
    shrunk = torch.cat([value.flatten() for value in before.values()]) * 1e-4 * 10
    # A weight of size 1 is known to 6e-8 before and after; the rest is what AdamW rounds.
    torch.testing.assert_close(moves[10.0], moves[0.0] - shrunk, rtol=0, atol=1e-6)


def test_supervised_loss_is_that_of_the_true_answers(taught, checkpoints):
    """These earn the full reward. The loss is the mean negative log-probability of their tokens, which the
    run has logged, and which has fallen; the gradient is that of this mean."""
    losses = [line["loss"] for line in metrics_of(taught, "sft")]
    assert len(losses) == 36 and losses[-1] < 0.1 * losses[0]
    config = train.sft_config(load_config(taught / "config.yaml", ["max_grad_norm=1e9"]))
    for folder in (checkpoints["qwen2_5_vl"], taught / "checkpoint"):
        policy = load_policy(str(folder), torch.float64)
        prompts, truths = prompts_of(policy, config), [s.truth(1.0) for s in samples_of(config)]
        completions = [[train.true_completion(policy, *p, config)] for p in zip(prompts, truths, strict=True)]
        for (completion,), truth in zip(completions, truths, strict=True):
            assert completion.ids[-1] == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert policy.tokenizer.decode(completion.ids[:-1]) == completion.text
            total = score(completion.text, truth, think=False).rewards["total"]
            assert total == pytest.approx(4, abs=0.05)  # the full reward, up to the text's grid
        short = train.true_completion(policy, prompts[0], truths[0], replace(config, max_new_tokens=9))
        assert short.ids == completions[0][0].ids[:9] and short.truncated and not completions[0][0].truncated
        direct = copy.deepcopy(policy.model)
        ids = [[c.ids for c in group] for group in completions]
        packed = pack_completions(policy, prompts, ids)
        loss = -completion_logprobs(replace(policy, model=direct), packed, 1.0).sum() / packed.mask.sum()
        loss.backward()
        start, gradient = flat(direct), torch.cat([p.grad.flatten() for p in direct.parameters()])
        slow = torch.cat(slow_logprobs(policy, prompts, ids, 1.0)).mean()
        descent = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        metrics = train.update(policy, None, descent, prompts, completions, [torch.ones(1)] * 6, config)
        # logits, below 16, are rounded to fp32: each log-prob is known to about 1e-6
        assert metrics["nll"] == pytest.approx(loss.item(), abs=1e-5) == -slow.item()
        assert (start - flat(policy.model) - gradient).norm() <= 1e-6 * gradient.norm()
        if folder == checkpoints["qwen2_5_vl"]:
            assert metrics["nll"] == pytest.approx(losses[0], abs=1e-4)  # the first batch, in fp32
    assert metrics["nll"] < 0.1 * losses[0]


def random_groups(policy, config, lengths=((9, 4, 1, 6), (5, 5, 8, 3), (2, 7, 7, 4))):
    """(prompts, completions, advantages): random answers and advantages are all the same to the update."""
    rng = np.random.default_rng(0)
    allowed = sorted(set(range(len(policy.tokenizer))) - set(policy.forbidden_ids))
    completions = [[Completion(rng.choice(allowed, n).tolist(), "", True) for n in row] for row in lengths]
    advantages = [torch.tensor(rng.normal(size=len(row))) for row in lengths]
    return prompts_of(policy, config)[: len(lengths)], completions, advantages


def nudged(policy):
    """A reference that is not the policy."""
    reference = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False).eval())
    generator = torch.Generator().manual_seed(1)
    for parameter in reference.model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return reference


def slow_loss(policy, reference, groups, config, old):
    """Eq. 12 in loops over answers and tokens; (loss, KL), and the old log-probs for the next update."""
    prompts, completions, advantages = groups
    completions = [[c.ids for c in group] for group in completions]
    advantages = torch.cat(advantages).tolist()
    now = slow_logprobs(policy, prompts, completions, config.temperature)
    old = old or [values.detach() for values in now]
    with torch.no_grad():
        ref = slow_logprobs(reference, prompts, completions, config.temperature)
    tokens, answers = sum(map(len, now)), len(now)
    loss = kl = 0.0
    for i in range(answers):
        share = {
            "token-mean": 1 / tokens,
            "sequence-mean": 1 / answers / len(now[i]),
            "constant": 1 / answers / config.max_new_tokens,
        }[config.loss_aggregation]
        for t in range(len(now[i])):
            ratio = torch.exp(now[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - config.clip_eps), 1 + config.clip_eps)
            gain = min(ratio * advantages[i], clipped * advantages[i])
            k3 = torch.exp(ref[i][t] - now[i][t]) - (ref[i][t] - now[i][t]) - 1
            loss = loss - share * (gain - config.kl_beta * k3)
            kl += share * k3.item()
    return loss, kl, old


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant"])
def test_updates_equal_loops(checkpoints, write_config, tmp_path, aggregation):
    """Two updates on one batch by plain gradient descent, cut into parts of two prompts, with gradient
    checkpointing, against the loops: loss, KL, gradient norm, and every weight."""
    overrides = ["temperature=0.9", "updates_per_batch=2", "kl_beta=0.1", "clip_eps=0.1", "max_grad_norm=1e9"]
    config = load_config(write_config(tmp_path), [*overrides, f"loss_aggregation={aggregation}"])
    policy = load_policy(str(checkpoints["qwen2_5_vl"]), torch.float64)
    groups, reference = random_groups(policy, config), nudged(policy)
    slow, start = replace(policy, model=copy.deepcopy(policy.model)), flat(policy.model)
    lr = 0.02 if aggregation != "constant" else 0.1
    policy.model.activation_checkpointing_enable()
    policy.model.train()
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=lr)
    metrics = train.update(policy, reference, optimizer, *groups, config)

    slow_optimizer, old = torch.optim.SGD(slow.model.parameters(), lr=lr), None
    for _ in range(2):
        slow_optimizer.zero_grad()
        loss, kl, old = slow_loss(slow, reference, groups, config, old)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in slow.model.parameters()]).norm()
        slow_optimizer.step()
    moved = (flat(slow.model) - start).norm()
    assert metrics["ratio_max"] > 1.1 and metrics["clip_frac"] > 0  # off the first policy
    # All is float64 but the logits (below 16), which are rounded to fp32: log-probs are known to 1e-6, their
    # exponentials to 2e-6 of their size, and terms of either sign cancel: ten times that, and two updates.
    assert metrics["loss"] == pytest.approx(loss.item(), rel=4e-5)
    assert metrics["kl"] == pytest.approx(kl, rel=4e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=4e-5)
    assert (flat(policy.model) - flat(slow.model)).norm() <= 4e-5 * moved


def test_first_update_has_ratio_one(qwen2_5, write_config, tmp_path):
    """The loss is then minus the mean advantage of the tokens; without KL no reference is needed. Answers of
    positive advantage gain likelihood over the others."""
    config = load_config(write_config(tmp_path), ["kl_beta=0"])
    prompts, completions, advantages = groups = random_groups(qwen2_5, config)
    packed = pack_completions(qwen2_5, prompts, [[c.ids for c in group] for group in completions])
    totals = []
    for lr in (0.01, 0.0):
        with torch.no_grad():
            totals.append(completion_logprobs(qwen2_5, packed, 1.0).sum(1).double())
        optimizer = torch.optim.SGD(qwen2_5.model.parameters(), lr=lr)
        metrics = train.update(qwen2_5, None, optimizer, *groups, config)
        assert metrics["ratio_max"] == 1 and metrics["clip_frac"] == metrics["kl"] == 0
        weights = torch.cat(advantages) @ packed.mask.sum(1).double()
        assert metrics["loss"] == pytest.approx(-weights.item() / metrics["tokens"], abs=1e-6)
        assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6) and metrics["grad_norm"] > 0
    assert (totals[1] - totals[0]) @ torch.cat(advantages) > 0


def test_the_gradient_is_clipped_as_a_whole(qwen2_5, write_config, tmp_path):
    """One step of plain descent goes the learning rate times max_grad_norm far, over all weights together."""
    config = load_config(write_config(tmp_path), ["kl_beta=0", "max_grad_norm=1e-3"])
    start, optimizer = flat(qwen2_5.model), torch.optim.SGD(qwen2_5.model.parameters(), lr=100)
    metrics = train.update(qwen2_5, None, optimizer, *random_groups(qwen2_5, config), config)
    assert metrics["grad_norm"] > 0.01
    assert (flat(qwen2_5.model) - start).norm().item() == pytest.approx(100 * 1e-3, rel=1e-3)


# rollout_batch, micro_batch, reuse_prompts, gradient_checkpointing
WAYS = ((3, 3, 0, 0), (1, 1, 0, 0), (2, 3, 0, 1), (3, 2, 1, 0), (2, 1, 1, 1))


@pytest.mark.parametrize("updates", [1, 2])
def test_ways_of_a_step_change_nothing(grpo_config, tmp_path, updates):
    """1, 2 or all prompts sampled, and learnt from, at a time; computed anew for the update or kept from the
    rollout: the same answers, and the same weights after the step. The vision tower runs once for each part;
    where prompts are kept, once for each of them, and not for the first update."""
    config = load_config(grpo_config(tmp_path, max_grad_norm=1e9, updates_per_batch=updates))
    results = []
    for rollout_batch, micro_batch, reuse, checkpointing in WAYS:
        way = replace(config, rollout_batch=rollout_batch, micro_batch=micro_batch, reuse_prompts=bool(reuse))
        policy, visits = load_policy(config.model, torch.float64), []
        reference, start, prompts = nudged(policy), flat(policy.model), prompts_of(policy, config)[:3]
        if checkpointing:
            policy.model.activation_checkpointing_enable()
        policy.model.train()
        policy.model.model.visual.register_forward_hook(lambda *_, visits=visits: visits.append(1))
        prompts, completions = train.sample_answers(policy, prompts, [(0, 0, k) for k in range(3)], way)
        advantages = [torch.tensor([1.0, -0.5, 0.75, -1.25])] * 3
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-3)
        metrics = train.update(policy, reference, optimizer, prompts, completions, advantages, way)
        ids = [[c.ids for c in group] for group in completions]
        results.append((ids, metrics, flat(policy.model) - start))
        sampled, learnt = 3 if reuse else -(-3 // rollout_batch), -(-3 // micro_batch)
        assert len(visits) == sampled + learnt * (updates - reuse)
    ids, metrics, moves = results[0]
    for other_ids, other_metrics, other_moves in results[1:]:
        assert other_ids == ids
        assert other_metrics == pytest.approx(metrics, rel=4e-5)  # as in test_updates_equal_loops
        assert (other_moves - moves).norm() <= 4e-5 * moves.norm()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_is_learnt_from_what_is_not_finite(qwen2_5, write_config, tmp_path, what):
    config = load_config(write_config(tmp_path), ["kl_beta=0"])
    prompts, completions, advantages = random_groups(qwen2_5, config)
    if what == "loss":
        advantages[1][2] = torch.inf
    else:
        next(qwen2_5.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = flat(qwen2_5.model)
    optimizer = torch.optim.AdamW(qwen2_5.model.parameters(), lr=1e-3)
    with pytest.raises(FloatingPointError, match=r"loss .*, gradient norm (nan|inf); lower learning_rate"):
        train.update(qwen2_5, None, optimizer, prompts, completions, advantages, config)
    assert torch.equal(flat(qwen2_5.model), before)


@pytest.fixture
def spoilt(world, tmp_path):
    """A copy of the world in which 1.y4m is missing, 4.y4m is no video."""
    videos = shutil.copytree(world, tmp_path / "videos")
    (videos / "1.y4m").unlink()
    (videos / "4.y4m").write_bytes(b"no video")
    return videos


def test_bad_videos_are_skipped_where_that_is_asked_for(tmp_path, write_config, spoilt, capsys):
    """Their sentences are never trained on, nor replaced by others, and fail in evaluation. A batch of none
    but such is passed over."""
    path = write_config(tmp_path, videos=str(spoilt), on_bad_video="skip", batch_size=1, eval_batch=4)
    samples = samples_of(load_config(path))
    order = [global_batch(samples, 1, step, seed=0)[0].id for step in range(6)]  # the first one is good
    train.main([path, "steps=6", "sft.steps=6", "sft.batch_size=1"])
    good = [step for step, name in enumerate(order, 1) if name not in ("1.y4m", "4.y4m")]
    for phase in ("sft", "grpo"):
        assert [line["step"] for line in metrics_of(tmp_path / "run", phase)] == good
    records = read_lines(tmp_path / "run/rollouts.jsonl")
    assert Counter(r["id"] for r in records) == dict.fromkeys(("0.y4m", "2.y4m", "3.y4m", "5.y4m"), 4)
    watched = read_lines(tmp_path / "run/watched.jsonl")
    assert [record["id"] for record in watched[:8]] == ["0.y4m"] * 4 + ["2.y4m"] * 4
    predictions = read_lines(tmp_path / "run/predictions.jsonl")
    assert [p["id"] for p in predictions if "unreadable" in p] == ["1.y4m", "4.y4m"]
    err = capsys.readouterr().err
    assert "4.y4m: 8 bytes that cannot be opened as a video" in err and "none of the 1 videos of step" in err


def test_skipping_a_video_changes_no_other_answer(tmp_path, grpo_config, world, spoilt):
    """Every prompt keeps its own random numbers."""
    path = grpo_config(tmp_path, on_bad_video="skip")
    answers = []
    for folder in (world, spoilt):
        config = load_config(path, [f"videos={folder}"])
        policy = load_policy(config.model)
        loader, batch = FrameLoader(config, policy.size_factor), list(enumerate(samples_of(config)))
        batch, _, prompts = train.make_prompts(policy, batch, loader, config)
        _, completions = train.sample_answers(policy, prompts, [(0, 0, k) for k, _ in batch], config)
        answers.append({k: [c.ids for c in g] for (k, _), g in zip(batch, completions, strict=True)})
    assert answers[0].pop(1) and answers[0].pop(4) and answers[0] == answers[1]


def test_a_first_batch_without_a_video(tmp_path, write_config):
    (tmp_path / "none").mkdir()
    path = write_config(tmp_path, videos=str(tmp_path / "none"), on_bad_video="skip", eval_limit=1, steps=1)
    with pytest.raises(VideoError, match=r"none of the 2 videos of step 1 can be read.* right folder\?"):
        train.main([path])


def test_a_video_that_ends_early(qwen2_5, tmp_path, write_config, world, capsys):
    """Of 24 frames 20 are left: 5 s. The truth is asked for up to there, and the prompt says so."""
    config = load_config(write_config(tmp_path), [f"videos={tmp_path}", "time_unit=frame", "fps=4"])
    sample, whole = samples_of(config)[0], (world / "0.y4m").read_bytes()
    (tmp_path / "0.y4m").write_bytes(whole[: len(whole) * 20 // 24 + 60])  # and a piece of the header
    late = replace(
        sample, first_frame=18, stop_frame=24, boxes=track_of(dict.fromkeys(range(18, 24), (0, 0, 1, 1)))
    )
    loader = FrameLoader(config, qwen2_5.size_factor)
    _, (truth,), (prompt,) = train.make_prompts(qwen2_5, [(0, late)], loader, config)
    assert truth.span == (18, 22) and set(truth.boxes) == set(range(18, 23))  # the last is held for 0.5 s
    assert len(prompt.frames) == 23 and "23 steps of 0.25 s" in qwen2_5.tokenizer.decode(prompt.ids)
    assert "0.y4m: ends early; the 23 steps that exist are used" in capsys.readouterr().err
    after = replace(late, first_frame=23, boxes=track_of({23: (0, 0, 1, 1)}))
    with pytest.raises(VideoError, match=r"0\.y4m: ends before the event of '0\.y4m' begins"):
        train.make_prompts(qwen2_5, [(0, after)], loader, config)


def test_exit_code_and_stderr(tmp_path, write_config):
    """The one test in a process of its own: exit code 1, one line on stderr, nothing on stdout."""
    command = [sys.executable, str(ROOT / "train.py"), write_config(tmp_path), "learning_rat=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: command line: unknown key learning_rat; did you mean learning_rate?\n"


WRONG = {
    "--steps": "--steps: no such option; settings are written key=value",
    "train_annotations={}/none.json": r"none\.json: cannot be read",
    "videos={}": r"6 of 6 videos missing: 0\.y4m, 1\.y4m, 2\.y4m, \.\.\.; set `videos`",
    "model={}": "name a checkpoint folder",
    "rewards.no.py:f=1": r"there is no file .*/no\.py",
    "rewards.{}/no.py:f=1": r"/no\.py is not below the current directory .*; copy it there",
    "output_dir={}/precious": "precious exists and is no run of train.py; choose another",
    "output_dir={}/precious/data": "data exists and is no run of train.py; choose another",
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_is_wrong_is_found_before_output_dir_is_made(tmp_path, write_config, setting):
    path = write_config(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/data").write_text("mine")
    with pytest.raises(UserError, match=WRONG[setting]) as caught:
        train.main([path, setting.format(tmp_path)])
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"config.yaml", "precious"}
    assert (tmp_path / "precious/data").read_text() == "mine"
