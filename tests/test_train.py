"""train.py: tiny runs end to end, one update against a loop over answers and tokens, and what bad input
says."""

import copy
import json
import math
import resource
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sft
import torch
import yaml
from shown import shown_prompt
from test_model import slow_logprobs

import train
from config import load_config
from data import load_samples
from model import Completion, completion_logprobs, pack_completions, rollout
from qwen import checkpoint
from qwen.checkpoint import load_policy
from rewards import TERMS, WEIGHTS, score
from runtime.files import write_jsonl
from video.frames import VideoError
from video.loader import open_loader

ROOT = Path(__file__).parent.parent
ROW = {"m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "N", "failures", "ceiling_m_tIoU", "ceiling_m_vIoU"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(run):
    model = load_policy(str(run / "checkpoint")).model
    return {name: value.clone() for name, value in model.state_dict().items()}


def samples_of(config):
    return load_samples(config.dataset, config.train_annotations, config.videos)[0]


# ----------------------------------------------------------------------------------------------------------
# Whole runs


SHORT = {"think": False, "max_new_tokens": 72}  # as `taught` answers


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config, taught):
    """The run folder of two steps of reinforcement learning on the taught checkpoint."""
    folder = tmp_path_factory.mktemp("grpo")
    changes = {"model": str(taught / "checkpoint"), "eval_every": 1, "save_every": 1, "seed": 3, **SHORT}
    train.main([write_config(folder, **changes), "learning_rate=1e-4"])
    return folder / "run"


def test_files_of_a_run(run, taught):
    files = {path.name for path in run.iterdir()} - {"pictures"}
    assert files == {
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "predictions_before.jsonl",
        "predictions_1.jsonl",
        "predictions.jsonl",
        "checkpoint_1",
        "checkpoint",
        "best_1",
        "summary.json",
    }
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["learning_rate"] == 1e-4 and settings["seed"] == 3 and settings["rewards"] == WEIGHTS
    assert {"python", "torch", "transformers", "decord"} <= json.loads(
        (run / "versions.json").read_text()
    ).keys()

    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {"before", "after", "reward", "seconds"}
    assert summary["before"].keys() == summary["after"].keys() == ROW
    assert summary["before"]["N"] == 6 and summary["before"]["m_vIoU"] > 5  # or all of this would mean little
    taught_row = json.loads((taught / "summary.json").read_text())["after"]
    assert summary["before"] == taught_row  # the same weights, read back, on the same split

    metrics = read_lines(run / "metrics.jsonl")
    assert [(m["phase"], m["step"]) for m in metrics] == [
        ("eval", 0),
        ("grpo", 1),
        ("eval", 1),
        ("grpo", 2),
        ("eval", 2),
    ]
    first, last = metrics[1], metrics[3]
    assert {*TERMS, "reward", "kl", "clip_frac", "loss", "grad_norm", "length", "truncated"} <= first.keys()
    assert summary["reward"] == {"first": first["reward"], "last": last["reward"]}
    assert first["kl"] == 0 and first["ratio_max"] == 1  # the policy is the reference, and the sampler
    assert last["kl"] > 0 and last["grad_norm"] > 0
    before, after = weights_of(taught), weights_of(run)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_rollouts_file(run):
    """Two steps, two prompts, four answers each: advantages and means follow from what is written."""
    records, metrics = read_lines(run / "rollouts.jsonl"), read_lines(run / "metrics.jsonl")
    assert [(r["step"], r["generation"]) for r in records] == [
        (s, g) for s in (1, 2) for _ in "ab" for g in range(4)
    ]
    assert len({r["reward"] for r in metrics if r["phase"] == "grpo"}) == 2
    groups = [records[k : k + 4] for k in range(0, 16, 4)]
    assert any(r["rewards"]["total"] > 0 for r in records)
    for group in groups:
        assert len({r["id"] for r in group}) == 1
        totals = np.array([r["rewards"]["total"] for r in group])
        expected = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-6)
        assert [r["advantage"] for r in group] == pytest.approx(expected.tolist(), abs=1e-9)
        for r in group:
            assert 1 <= r["length"] <= 72 and isinstance(r["truncated"], bool)
            assert r["rewards"].keys() == {*TERMS, "total"}
            assert (r["span"] is None) == (r["pred_boxes"] is None) and r["think_boxes"] is None
    for step, m in zip((1, 2), (m for m in metrics if m["phase"] == "grpo"), strict=True):
        totals = [r["rewards"]["total"] for r in records if r["step"] == step]
        assert m["reward"] == pytest.approx(np.mean(totals), abs=1e-6)
        assert m["length"] == np.mean([r["length"] for r in records if r["step"] == step])


def test_bench_reads_rollouts(run, capsys):
    from lab import bench

    bench.main([str(run / "rollouts.jsonl")])
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again == read_lines(run / "rollouts.jsonl")


def test_greedy_prediction_of_the_run_is_the_checkpoints(run):
    config = load_config(run / "config.yaml")
    policy, sample = load_policy(str(run / "checkpoint")), samples_of(config)[1]
    prompt = shown_prompt(policy, sample, config.max_side, config.text_format)
    ((completion,),) = rollout(policy, [prompt], 1, 72, 0.0, [(0,)])
    record = read_lines(run / "predictions.jsonl")[1]
    assert (record["id"], record["completion"]) == (sample.id, completion.text)


def test_same_seed_same_run(write_config, tmp_path, capsys, taught, run):
    """Byte for byte; the first run makes room for the second. Another seed is another run."""
    path = write_config(tmp_path, model=str(taught / "checkpoint"), eval_limit=1, steps=1, **SHORT)
    train.main([path])
    train.main([path])
    assert f"{tmp_path}/run held an earlier run: moved to {tmp_path}/run.1" in capsys.readouterr().out
    for name in ("rollouts.jsonl", "predictions.jsonl", "checkpoint/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run.1" / name).read_bytes()
    first, other = (read_lines(folder / "rollouts.jsonl")[:8] for folder in (tmp_path / "run", run))
    assert [r["completion"] for r in first] != [r["completion"] for r in other]


def test_thinking_and_checkpointing_from_nothing(write_config, tmp_path):
    """The defaults think: true and gradient checkpointing, a model that has learnt nothing, no KL: it runs,
    and every answer is a failure that costs nothing."""
    train.main([write_config(tmp_path), "kl_beta=0", "steps=1", "eval_limit=2", "rollout_batch=1"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    after = {key: value for key, value in summary["after"].items() if "ceiling" not in key}
    assert after == {"m_tIoU": 0, "m_vIoU": 0, "vIoU@0.3": 0, "vIoU@0.5": 0, "N": 2, "failures": 2}
    assert summary["reward"] == {"first": 0, "last": 0}
    (metrics,) = (m for m in read_lines(tmp_path / "run/metrics.jsonl") if m["phase"] == "grpo")
    assert (metrics["kl"], metrics["grad_norm"], metrics["zero_spread"]) == (0, 0, 1)


def test_supervised_phase_teaches_the_true_answers(taught, checkpoints):
    """The logged loss falls, and so does that of the true answers, one by one, outside the loop."""
    losses = [m["loss"] for m in read_lines(taught / "metrics.jsonl") if m["phase"] == "sft"]
    assert len(losses) == 36 and losses[-1] < 0.1 * losses[0]
    config = load_config(taught / "config.yaml")
    values = []
    for folder in (checkpoints["qwen2_5_vl"], taught / "checkpoint"):
        policy = load_policy(str(folder))
        prompts = [shown_prompt(policy, s, config.max_side, config.text_format) for s in samples_of(config)]
        answers = [
            [sft.true_completion(policy, sample.truth(1.0), prompt, config)]
            for sample, prompt in zip(samples_of(config), prompts, strict=True)
        ]
        with torch.no_grad():
            values.append(-torch.cat(slow_logprobs(policy, prompts, answers, 1.0)).mean().item())
    assert values[0] == pytest.approx(losses[0], abs=1e-4)  # the first batch was the whole split
    assert values[1] < 0.1 * values[0]


def test_true_completion_earns_the_full_reward(qwen2_5, write_config, tmp_path):
    config = load_config(write_config(tmp_path))
    for sample in samples_of(config):
        prompt = shown_prompt(qwen2_5, sample, config.max_side, config.text_format)
        *ids, end = sft.true_completion(qwen2_5, sample.truth(1.0), prompt, config)
        assert end == qwen2_5.end_id == qwen2_5.tokenizer.convert_tokens_to_ids("<|im_end|>")
        total = score(qwen2_5.tokenizer.decode(ids), sample.truth(1.0)).rewards["total"]
        assert total == pytest.approx(5, abs=0.05)  # rounding to the text's grid


# ----------------------------------------------------------------------------------------------------------
# One update


def make_groups(policy, config, lengths=((9, 4, 1, 6), (5, 5, 8, 3), (2, 7, 7, 4))):
    """Three prompts with random answers and random advantages: all the same to the update."""
    rng, groups = np.random.default_rng(0), []
    allowed = sorted(set(range(len(policy.tokenizer))) - set(policy.forbidden_ids))
    for sample, row in zip(samples_of(config), lengths, strict=False):
        truth = sample.truth(config.text_format.step_seconds)
        completions = [Completion(rng.choice(allowed, n).tolist(), "", True) for n in row]
        scores = [score(c.text, truth) for c in completions]
        prompt = shown_prompt(policy, sample, config.max_side, config.text_format)
        advantages = torch.tensor(rng.normal(size=len(row)))
        groups.append(train.Group(sample, truth, prompt, completions, scores, advantages))
    return groups


def nudged(policy):
    """A reference that is not the policy."""
    reference = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False).eval())
    generator = torch.Generator().manual_seed(1)
    for parameter in reference.model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return reference


def slow_losses(policy, reference, groups, config, old):
    """Eq. 12 in loops over answers and tokens; (loss, KL), and the old log-probs for the next update."""
    prompts = [group.prompt for group in groups]
    ids = [[c.ids for c in group.completions] for group in groups]
    advantages = [float(a) for group in groups for a in group.advantages]
    now = slow_logprobs(policy, prompts, ids, config.temperature)
    old = old or [values.detach() for values in now]
    with torch.no_grad():
        ref = slow_logprobs(reference, prompts, ids, config.temperature)
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
def test_updates_equal_loops(qwen2_5, write_config, tmp_path, aggregation):
    """Two updates on one batch by plain gradient descent, cut into parts of two prompts, with gradient
    checkpointing, against the loops: loss, KL, gradient norm, and every weight."""
    overrides = ["temperature=0.9", "updates_per_batch=2", "kl_beta=0.1", "clip_eps=0.1", "max_grad_norm=1e9"]
    config = load_config(write_config(tmp_path), [*overrides, f"loss_aggregation={aggregation}"])
    groups, reference = make_groups(qwen2_5, config), nudged(qwen2_5)
    slow = replace(qwen2_5, model=copy.deepcopy(qwen2_5.model))
    lr = 0.02 if aggregation != "constant" else 0.1
    qwen2_5.model.activation_checkpointing_enable()
    qwen2_5.model.train()
    optimizer = torch.optim.SGD(qwen2_5.model.parameters(), lr=lr)
    metrics = train.improve(qwen2_5, reference, optimizer, groups, config)

    slow_optimizer, old = torch.optim.SGD(slow.model.parameters(), lr=lr), None
    for _ in range(2):
        slow_optimizer.zero_grad()
        loss, kl, old = slow_losses(slow, reference, groups, config, old)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in slow.model.parameters()]).norm()
        slow_optimizer.step()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=2e-5)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert (
        metrics["ratio_max"] > 1.1 and metrics["clip_frac"] > 0
    )  # the second update is off the first policy
    for (name, value), expected in zip(
        qwen2_5.model.named_parameters(), slow.model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            value, expected, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_first_update_has_ratio_one(qwen2_5, write_config, tmp_path):
    config = load_config(write_config(tmp_path), ["kl_beta=0"])
    groups = make_groups(qwen2_5, config)
    optimizer = torch.optim.SGD(qwen2_5.model.parameters(), lr=0.0)
    metrics = train.improve(qwen2_5, None, optimizer, groups, config)  # without KL no reference is needed
    assert metrics["ratio_max"] == 1 and metrics["clip_frac"] == metrics["kl"] == 0
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6) and metrics["grad_norm"] > 0
    tokens = sum(len(c.ids) for g in groups for c in g.completions)
    weighted = sum(
        float(a) * len(c.ids) for g in groups for a, c in zip(g.advantages, g.completions, strict=True)
    )
    assert metrics["loss"] == pytest.approx(-weighted / tokens, abs=1e-6)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        train.improve(qwen2_5, None, optimizer, groups, replace(config, kl_beta=0.1))


# rollout_batch, micro_batch, reuse_prompts, gradient_checkpointing
WAYS = ((3, 3, 0, 0), (1, 1, 0, 0), (2, 3, 0, 1), (1, 2, 0, 0), (3, 3, 1, 0), (2, 1, 1, 1))


@pytest.mark.parametrize("updates", [1, 2])
def test_ways_of_a_step_change_nothing(taught, write_config, tmp_path, updates):
    """1, 2 or all prompts sampled, and learnt from, at a time; read anew for the update or kept from the
    rollout: the same answers, the same rewards, the same weights after the step. The vision tower runs once
    for each part; where prompts are kept, once for each of them, and not for the first update."""
    path = write_config(tmp_path, model=str(taught / "checkpoint"), batch_size=3, seed=2, **SHORT)
    results, visits = [], []
    for size, micro, keep, checkpointing in WAYS:
        way = [f"rollout_batch={size}", f"micro_batch={micro}", f"reuse_prompts={bool(keep)}"]
        way += [f"gradient_checkpointing={bool(checkpointing)}", f"updates_per_batch={updates}"]
        config = load_config(path, way)
        policy = load_policy(config.model)
        reference, samples = nudged(policy), samples_of(config)[:3]
        clips = open_loader(config, policy.size_factor)
        if checkpointing:
            policy.model.activation_checkpointing_enable()
        policy.model.train()
        seen = []
        policy.model.model.visual.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        groups = []
        for first in range(0, 3, size):
            keys = [(0, 0, k) for k in range(first, min(first + size, 3))]
            groups += train.sample_and_score(policy, samples[first : first + size], keys, clips, config)
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
        metrics = train.improve(policy, reference, optimizer, groups, config)
        records = train.rollout_records(groups, 1, config)
        results.append((records, metrics, torch.cat([p.flatten() for p in policy.model.parameters()])))
        visits.append((len(seen), (3 if keep else -(-3 // size)) + -(-3 // micro) * (updates - keep)))
    before = torch.cat([p.flatten() for p in load_policy(config.model).model.parameters()])
    records, metrics, weights = results[0]
    assert any(record["advantage"] for record in records) and (weights - before).abs().max() > 1e-3
    for other_records, other_metrics, other_weights in results[1:]:
        assert other_records == records
        assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        assert (other_weights - weights).abs().max() <= 1e-5
    assert all(found == expected for found, expected in visits)


def test_reference_does_not_move(qwen2_5, write_config, tmp_path):
    config = load_config(write_config(tmp_path), ["updates_per_batch=2"])
    reference = checkpoint.freeze(qwen2_5, config)
    before = [parameter.clone() for parameter in reference.model.parameters()]
    train.improve(
        qwen2_5, reference, train.adamw(qwen2_5, 1e-3, config), make_groups(qwen2_5, config), config
    )
    assert all(map(torch.equal, before, reference.model.parameters()))
    assert not any(p.requires_grad for p in reference.model.parameters()) and not reference.model.training
    moved = zip(before, qwen2_5.model.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in moved)


def test_update_raises_the_better_answer(qwen2_5, write_config, tmp_path):
    """What it is all for: answers of positive advantage gain likelihood over those of negative advantage."""
    config = load_config(write_config(tmp_path), ["kl_beta=0"])
    (group,) = make_groups(qwen2_5, config, lengths=((6, 6, 6, 6),))
    group.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    batch = pack_completions(qwen2_5, [group.prompt], [[c.ids for c in group.completions]])
    totals = []
    for _ in range(2):
        with torch.no_grad():
            totals.append(completion_logprobs(qwen2_5, batch, 1.0).sum(1))
        train.improve(qwen2_5, None, torch.optim.SGD(qwen2_5.model.parameters(), lr=0.01), [group], config)
    assert (totals[1] - totals[0]) @ group.advantages.float() > 0


def test_nothing_is_learnt_from_a_loss_that_is_not_finite(qwen2_5, write_config, tmp_path):
    config = load_config(write_config(tmp_path))
    optimizer = train.adamw(qwen2_5, 1e-3, config)
    before = [parameter.detach().clone() for parameter in qwen2_5.model.parameters()]
    for parameter in qwen2_5.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(FloatingPointError, match=r"loss 1\.0, gradient norm inf; lower learning_rate"):
        train.optimizer_step(qwen2_5, optimizer, config, 1.0)
    for parameter in qwen2_5.model.parameters():
        parameter.grad.zero_()
    with pytest.raises(FloatingPointError, match=r"loss nan, gradient norm 0\.0; lower learning_rate"):
        train.optimizer_step(qwen2_5, optimizer, config, math.nan)
    assert all(map(torch.equal, before, qwen2_5.model.parameters()))


def test_batches_are_epochs():
    """Seven sentences, batches of three: any seven in a row are all of them, in each epoch's own order."""
    names = list("abcdefg")
    stream = [name for step in range(14) for name in train.batch_of(names, 3, step, seed=5)]
    epochs = ["".join(stream[k : k + 7]) for k in range(0, 42, 7)]
    assert all(Counter(epoch) == Counter(names) for epoch in epochs) and len(set(epochs)) == 6
    assert stream[:3] == train.batch_of(names, 3, 0, seed=5) != train.batch_of(names, 3, 0, seed=6)
    assert Counter(train.batch_of(names, 16, 0, seed=0)).most_common()[-1][1] == 2  # more than there are


# ----------------------------------------------------------------------------------------------------------
# Bad input


def error_of(arguments, monkeypatch, script="train.py"):
    """What the script exits with: sys.exit(text) prints it to stderr, and the exit code is 1."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def edited_world(world, folder, edit):
    """A copy of the annotations, one record edited; the videos stay where they are."""
    records = json.loads((world / "all.json").read_text())
    edit(records["2.y4m"])
    (folder / "edited.json").write_text(json.dumps(records))
    return str(folder / "edited.json")


def test_exit_code_and_stderr(tmp_path, write_config):
    """The one test in a process of its own: exit code 1, one line on stderr, nothing on stdout."""
    command = [sys.executable, str(ROOT / "train.py"), write_config(tmp_path), "learning_rat=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: command line: unknown key learning_rat; did you mean learning_rate?\n"
    assert not (tmp_path / "run").exists()


def test_settings_and_annotations_that_are_wrong(tmp_path, write_config, world, monkeypatch):
    """All are found before output_dir is made."""
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "no.json").write_text("")
    outside = edited_world(world, tmp_path, lambda r: r["bbox"].__setitem__(0, [60, 60, 5, 5]))
    cases = {
        ("steps=many",): "steps: 'many' must be a whole number",
        ("train_annotations=",): "no annotation file is named: set eval_annotations, and train_annotations",
        (f"train_annotations={tmp_path}/none.json",): "none.json: cannot be read (No such file",
        (f"train_annotations={tmp_path}/empty.json",): "empty.json: holds no records",
        (f"eval_annotations={tmp_path}/no.json",): "no.json: is not a JSON file",
        (f"train_annotations={outside}",): "[60, 60, 5, 5] lies outside the 56 x 56 video; correct or remove",
        (f"videos={tmp_path}",): f"{tmp_path}: 6 of 6 videos missing: 0.y4m, 1.y4m, 2.y4m, ...; set `videos`",
        (f"model={tmp_path}",): "neither a checkpoint folder (with a config.json)",
        ("dataset=vidstg",): "dataset: vidstg needs `vidor`, the folder of VidOR's annotations",
        ("answer_format=csv", "coordinates=relative", "think=false"): "csv is to evaluate only; train with",
    }
    path = write_config(tmp_path)
    for overrides, message in cases.items():
        assert message in error_of([path, *overrides], monkeypatch)
    assert "cannot be read" in error_of([str(tmp_path / "none.yaml")], monkeypatch)
    late = edited_world(world, tmp_path, lambda r: r.update(st_frame=25))
    message = error_of([path, f"train_annotations={late}"], monkeypatch)
    assert "2.y4m" in message and "st_frame 25 lies after the end of the video (img_num 24)" in message
    (tmp_path / "qwen3_5").mkdir()
    (tmp_path / "qwen3_5/config.json").write_text('{"model_type": "qwen3_5"}')
    assert "cannot score answers under a tree mask" in error_of(
        [path, f"model={tmp_path}/qwen3_5"], monkeypatch
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["noise", "cut"])
def test_video_that_cannot_be_read(tmp_path, write_config, world, monkeypatch, broken):
    """Found when it is decoded; what stands in output_dir by then is whole."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for n in range(6):
        (videos / f"{n}.y4m").write_bytes((world / f"{n}.y4m").read_bytes())
    whole = (videos / "4.y4m").read_bytes()
    (videos / "4.y4m").write_bytes(b"no video" if broken == "noise" else whole[: len(whole) // 2])
    message = error_of([write_config(tmp_path, videos=str(videos))], monkeypatch)
    assert message.startswith(f"error: {videos}/4.y4m: ") and "annotation" in message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "versions.json"}
    assert load_config(tmp_path / "run/config.yaml").videos == str(videos)


def test_bad_videos_are_skipped_where_that_is_asked_for(tmp_path, write_config, world, capsys):
    """Two of six: their sentences are never trained on, nor replaced by others, and fail in evaluation."""
    videos = tmp_path / "videos"
    shutil.copytree(world, videos)
    (videos / "1.y4m").unlink()
    (videos / "4.y4m").write_bytes(b"no video")
    settings = [f"videos={videos}", "on_bad_video=skip", "batch_size=6", "steps=1", "sft.steps=1"]
    train.main([write_config(tmp_path), *settings])
    records = read_lines(tmp_path / "run/rollouts.jsonl")
    assert Counter(r["id"] for r in records) == dict.fromkeys(("0.y4m", "2.y4m", "3.y4m", "5.y4m"), 4)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["N"] == 6 and summary["after"]["failures"] >= 2
    predictions = read_lines(tmp_path / "run/predictions.jsonl")
    assert [p["id"] for p in predictions if "unreadable" in p] == ["1.y4m", "4.y4m"]
    err = capsys.readouterr().err
    assert err.count("skipped: ") == 2 and "4.y4m: 8 bytes that cannot be opened as a video" in err


def test_skipping_a_video_changes_no_other_answer(taught, tmp_path, write_config, world):
    """Every prompt keeps its own random numbers."""
    videos = tmp_path / "videos"
    shutil.copytree(world, videos)
    (videos / "1.y4m").write_bytes(b"no video")
    path = write_config(tmp_path, model=str(taught / "checkpoint"), on_bad_video="skip", **SHORT)
    answers = []
    for folder in (world, videos):
        config = load_config(path, [f"videos={folder}"])
        policy = load_policy(config.model)
        clips = open_loader(config, policy.size_factor)
        keys = [(0, 0, k) for k in range(6)]
        groups = train.sample_and_score(policy, samples_of(config), keys, clips, config)
        answers.append({g.sample.id: [c.ids for c in g.completions] for g in groups})
    assert answers[0].pop("1.y4m") and answers[0] == answers[1]


def test_a_batch_without_a_video(tmp_path, write_config, monkeypatch):
    (tmp_path / "none").mkdir()
    settings = [f"videos={tmp_path}/none", "on_bad_video=skip", "eval_limit=1", "steps=1"]
    message = error_of([write_config(tmp_path), *settings], monkeypatch)
    assert message.startswith("error: none of the 2 videos of step 1 can be read, such as ")
    assert message.endswith("is `videos` the right folder?")


def test_a_later_batch_without_a_video_is_passed_over(tmp_path, write_config, world, capsys):
    """One prompt a step; the order of the first epoch puts the broken one third."""
    videos = tmp_path / "videos"
    shutil.copytree(world, videos)
    path = write_config(tmp_path)
    config = load_config(path)
    third = train.batch_of(samples_of(config), 1, 2, config.seed)[0]
    (videos / third.id).write_bytes(b"no video")
    settings = [f"videos={videos}", "on_bad_video=skip", "batch_size=1", "steps=4", "eval_limit=1"]
    train.main([path, *settings, "sft.steps=4", "sft.batch_size=1"])
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    for phase in ("sft", "grpo"):
        assert [m["step"] for m in metrics if m["phase"] == phase] == [1, 2, 4]
    assert "skipped: none of the 1 videos of step 3 can be read" in capsys.readouterr().err


def test_a_video_that_ends_early(qwen2_5, tmp_path, write_config, world, capsys):
    """Of 24 frames 20 are left: 5 s. The truth is asked for up to there, and the prompt says so."""
    videos = tmp_path / "videos"
    shutil.copytree(world, videos)
    config = load_config(write_config(tmp_path), [f"videos={videos}", "time_unit=frame", "fps=4"])
    samples = samples_of(config)
    whole = (videos / "0.y4m").read_bytes()
    (videos / "0.y4m").write_bytes(whole[: len(whole) * 20 // 24 + 60])  # and a piece of the header
    late = replace(
        samples[0], first_frame=18, stop_frame=24, boxes=dict.fromkeys(range(18, 24), (0, 0, 1, 1))
    )
    clips = open_loader(config, qwen2_5.size_factor)
    ((_, truth, prompt),) = train.questions(qwen2_5, [late], clips, config)
    assert truth.span == (18, 22) and set(truth.boxes) == set(range(18, 23))  # the last is held for 0.5 s
    assert len(prompt.frames) == 23 and "23 steps of 0.25 s" in qwen2_5.tokenizer.decode(prompt.ids)
    assert "0.y4m: ends early; the 23 steps that exist are used" in capsys.readouterr().err
    after = replace(late, first_frame=23, boxes={23: (0, 0, 1, 1)})
    with pytest.raises(VideoError, match=r"0\.y4m: ends before the event of '0\.y4m' begins"):
        train.questions(qwen2_5, [after], clips, config)


def test_output_dir_that_cannot_be_made(tmp_path, write_config, monkeypatch):
    """Below a regular file not even root can make a folder."""
    (tmp_path / "file").write_text("mine")
    place = f"{tmp_path}/file/run"
    message = error_of([write_config(tmp_path), f"output_dir={place}"], monkeypatch)
    assert message == f"error: {place}: Not a directory; free some space, or choose another output_dir"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_dir_that_is_no_run_is_left_alone(tmp_path, write_config, monkeypatch, kind):
    place = tmp_path / "precious"
    if kind == "folder":
        place.mkdir()
    mine = place / "data" if kind == "folder" else place
    mine.write_text("mine")
    message = error_of([write_config(tmp_path), f"output_dir={place}"], monkeypatch)
    assert message == f"error: output_dir: {place} exists and is no run of train.py; choose another"
    assert mine.read_text() == "mine" and not Path(f"{place}.1").exists()


def test_settings_reach_the_step(tmp_path, write_config, taught):
    """Weights, unscaled advantages and the evaluation's temperature, from what the run wrote."""
    config = write_config(tmp_path, model=str(taught / "checkpoint"), batch_size=6, eval_limit=1, **SHORT)
    weights = {"format": 1, "consistency": 2, "temporal": 3, "spatial": 0.5, "think": 0, "giou": 1, "l1": 0}
    changes = [f"rewards.{name}={value}" for name, value in weights.items()]
    changes += ["scale_rewards=false", "learning_rate=0", "eval_temperature=2.0"]
    train.main([config, *changes])
    records = read_lines(tmp_path / "run/rollouts.jsonl")
    for r in records:
        terms, settings = r["rewards"], load_config(tmp_path / "run/config.yaml")
        total = terms["format"] + 2 * terms["consistency"] + 3 * terms["temporal"]
        assert terms["total"] == pytest.approx(total + 0.5 * terms["spatial_pred"], abs=1e-9)
        sample = next(s for s in samples_of(settings) if s.id == r["id"])
        expected = score(r["completion"], sample.truth(1.0), weights={"l1": 0}, think=False).rewards
        assert terms["spatial_pred"] == expected["spatial_pred"]  # GIoU alone
    totals = np.array([r["rewards"]["total"] for r in records]).reshape(-1, 4)
    advantages = np.array([r["advantage"] for r in records]).reshape(-1, 4)
    assert advantages == pytest.approx(totals - totals.mean(1, keepdims=True), abs=1e-9)
    assert totals.std(1).max() > 0.1
    greedy = read_lines(taught / "predictions.jsonl")[0]["completion"]
    assert read_lines(tmp_path / "run/predictions.jsonl")[0]["completion"] != greedy


def test_every_step_draws_its_own_answers(tmp_path, write_config, taught, world):
    """One prompt, the first of its batch in both steps, and weights that stay: only the step is another."""
    key, record = next(iter(json.loads((world / "all.json").read_text()).items()))
    (tmp_path / "one.json").write_text(json.dumps({key: record}))
    changes = {"train_annotations": str(tmp_path / "one.json"), "batch_size": 1, "eval_limit": 1, **SHORT}
    path = write_config(tmp_path, model=str(taught / "checkpoint"), **changes)
    train.main([path, "learning_rate=0", "temperature=2.0"])
    records = read_lines(tmp_path / "run/rollouts.jsonl")
    first, second = ([r["completion"] for r in records if r["step"] == step] for step in (1, 2))
    assert len(first) == len(second) == 4
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_warm_up_and_weight_decay(tmp_path, write_config, taught):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient, and shrinks it by
    learning rate x decay: after one step of four of warm-up, by a quarter of both."""
    before = weights_of(taught)
    moves = {}
    for decay in (0.0, 10.0):
        path = write_config(tmp_path, model=str(taught / "checkpoint"), steps=1, eval_limit=1, **SHORT)
        train.main([path, "learning_rate=4e-4", "warmup_steps=4", f"weight_decay={decay}"])
        after = weights_of(tmp_path / "run")
        moves[decay] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert moves[0.0].abs().max() == pytest.approx(1e-4, rel=0.02)
    shrunk = torch.cat([before[name].flatten() for name in before]) * 1e-4 * 10
    torch.testing.assert_close(moves[10.0], moves[0.0] - shrunk, rtol=0, atol=1e-6)


def test_no_space_for_the_checkpoint(tmp_path, write_config, taught, monkeypatch):
    """No file may grow beyond 200 kB, and the checkpoint is larger: nothing of it stays."""
    changes = {"model": str(taught / "checkpoint"), "eval_limit": 1, "steps": 0, **SHORT}
    path, (soft, hard) = write_config(tmp_path, **changes), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        message = error_of([path], monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path}/run/checkpoint: cannot be written" in message and "free some space" in message
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "versions.json", "metrics.jsonl", "predictions_before.jsonl"}


def test_no_space_for_the_logs(tmp_path):
    """A line is there or not, never half of it."""
    (soft, hard), path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "metrics.jsonl"
    written = 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError) as caught:
            for written in range(100):
                write_jsonl([{"step": written, "reward": 0.5}], path, append=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record["step"] for record in read_lines(path)] == list(range(written))
    assert path.stat().st_size > 950 and caught.value.filename == str(path)
