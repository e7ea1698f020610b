"""Train a Qwen-VL to answer "when and where?" with boxes: STVG-o1, reinforcement fine-tuning by GRPO.

    torchrun train.py                                      the embedded default: configs/toy.yaml
    torchrun train.py configs/hcstvg.yaml steps=500        another configuration, settings replaced

Evaluate, fine-tune on true answers if `sft` asks for it, then `steps` times: sample, score, compare, improve,
log; evaluate again. Everything goes to output_dir:

    config.yaml, versions.json       all settings, resolved; what the run ran on
    metrics.jsonl                    one line an optimiser step, and one an evaluation
    rollouts.jsonl                   one line a sampled answer (`python rewards.py` reads it)
    predictions_before.jsonl, predictions.jsonl    greedy answers on the held-out split
    checkpoint/                      the trained model, as Hugging Face's from_pretrained reads it
    summary.json                     scores before and after, the reward, seconds
    pictures/                        curves and answers, where matplotlib is installed

Departures from the paper are the fields of config.py that say "not in the paper".
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
import transformers
from tqdm import trange

from clips import Clips, open_clips
from config import Config, ConfigError, load_config, save_config
from data import Sample, check_videos
from evaluate import (
    answer_record,
    coordinates_note,
    decode,
    fingerprint_of,
    load_split,
    score_predictions,
    write_jsonl,
)
from files import run_script, write_whole
from grpo import group_advantages, loss_normalizer, policy_loss
from metrics import format_table
from model import (
    Completion,
    Prompt,
    completion_logprobs,
    completion_mask,
    make_prompt,
    pack_completions,
    rollout,
)
from policy import Policy, load_policy, save_policy
from prompts import Truth, format_answer, truth_answer
from rewards import TERMS, Score, score
from video import VideoError

ROOT = Path(__file__).parent


@dataclass
class Group:
    """One prompt and its G sampled answers."""

    sample: Sample
    truth: Truth
    prompt: Prompt
    completions: list[Completion]
    scores: list[Score]
    advantages: torch.Tensor  # (G,) float64


def main(arguments: list[str]) -> None:
    started = time.time()
    if not arguments or "=" in arguments[0]:
        arguments = [str(ROOT / "configs/toy.yaml"), *arguments]
    config = load_config(arguments[0], arguments[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("torchrun: this version trains in one process; leave out --nproc_per_node")
    if config.answer_format != "boxes":
        raise ConfigError(f"answer_format: {config.answer_format} is to evaluate only; train with boxes")
    if config.threads:
        torch.set_num_threads(config.threads)
    train_samples, _ = load_split(config, config.train_annotations)
    eval_samples = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
    if config.on_bad_video == "error":
        check_videos(train_samples + eval_samples)
    policy = load_policy(config.model, device="cuda" if torch.cuda.is_available() else "cpu")
    run = start_run(config)
    print(describe(config, policy, train_samples, eval_samples), end="")
    with contextlib.closing(open_clips(config, policy.size_factor)) as clips:
        before, rewards, after = learn(policy, train_samples, eval_samples, clips, config, run)
    few = max(1, len(rewards) // 10)  # a single step's mean is noise
    first, last = (float(np.mean(part)) if part else None for part in (rewards[:few], rewards[-few:]))
    seconds = time.time() - started
    reward = {"first": first, "last": last}
    write_json({"before": before, "after": after, "reward": reward, "seconds": seconds}, run / "summary.json")
    print(format_table({"before": before, "after": after}))
    if rewards:
        print(f"mean sampled reward, first and last {few} of {len(rewards)} steps: {first:.2f} -> {last:.2f}")
    print(f"{seconds:.0f} s; everything is in {run}/; {draw_pictures(run)}")


def learn(
    policy: Policy,
    train_samples: list[Sample],
    eval_samples: list[Sample],
    clips: Clips,
    config: Config,
    run: Path,
) -> tuple[dict, list[float], dict]:
    """Evaluate, fine-tune on true answers if `sft` asks for it, learn from rewards, evaluate again. Returns
    the held-out scores before, the mean reward of each step, and the scores after."""
    before = evaluate_split(policy, eval_samples, clips, config, run / "predictions_before.jsonl", "before")
    log({"phase": "eval", "step": 0, **before}, run)

    if config.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    if config.sft.steps:
        supervise(policy, train_samples, clips, config, run)

    reference = freeze(policy) if config.kl_beta and config.steps else None
    optimizer = adamw(policy, config.learning_rate, config)
    progress = []  # (reward, vIoU) of each step
    bar = trange(config.steps, desc="GRPO", unit="step")
    for step in bar:
        clock = time.time()
        set_learning_rate(optimizer, config.learning_rate * min(1, (step + 1) / max(1, config.warmup_steps)))
        size = config.batch_size
        samples, following = (batch_of(train_samples, size, n, config.seed) for n in (step, step + 1))
        clips.ahead(samples + following)

        groups = []
        for first in range(0, len(samples), config.rollout_batch):
            part = samples[first : first + config.rollout_batch]
            keys = [(config.seed, step, first + k) for k in range(len(part))]  # of their random numbers
            groups += sample_and_score(policy, part, keys, clips, config)
        if not groups:
            pass_over(samples, step, clips)
            continue
        sampled = time.time()
        write_jsonl(rollout_records(groups, step + 1, config), run / "rollouts.jsonl", append=True)
        metrics = improve(policy, reference, optimizer, groups, config)

        metrics = {"phase": "grpo", "step": step + 1, **summarize_groups(groups), **metrics}
        metrics["prompts"] = len(groups)  # fewer than batch_size where videos cannot be read
        metrics["seconds"] = {"rollout": sampled - clock, "update": time.time() - sampled}
        log(metrics, run)
        progress.append((metrics["reward"], metrics["viou_pred"]))
        reward, viou = np.mean(progress[-10:], axis=0)
        bar.set_postfix_str(f"reward {reward:.2f}, vIoU {viou:.2f}", refresh=False)
        more = step + 1 < config.steps  # the last step has its evaluation and checkpoint below
        if more and config.eval_every and (step + 1) % config.eval_every == 0:
            path = run / f"predictions_{step + 1}.jsonl"
            scores = evaluate_split(policy, eval_samples, clips, config, path, f"step {step + 1}")
            log({"phase": "eval", "step": step + 1, **scores}, run)
        if more and config.save_every and (step + 1) % config.save_every == 0:
            save_policy(policy, run / f"checkpoint_{step + 1}")

    save_policy(policy, run / "checkpoint")
    fingerprint = fingerprint_of(str(run / "checkpoint"), dataclasses.replace(config, eval_dtype="float32"))
    path = run / "predictions.jsonl"
    after = evaluate_split(policy, eval_samples, clips, config, path, "after", fingerprint)
    log({"phase": "eval", "step": config.steps, **after}, run)
    return before, [reward for reward, _ in progress], after


# ----------------------------------------------------------------------------------------------------------
# One training step: sample and score, compare, improve


def sample_and_score(
    policy: Policy, samples: list[Sample], keys: list, clips: Clips, config: Config
) -> list[Group]:
    """G answers to each sample's prompt, their rewards, and their advantages within the group. keys: see
    model.rollout."""
    shown = questions(policy, samples, clips, config)
    prompts, keys = [prompt for _, _, prompt in shown], [keys[k] for k, _, _ in shown]
    answers = rollout(
        policy, prompts, config.num_generations, config.max_new_tokens, config.temperature, keys
    )
    groups = []
    for (k, truth, prompt), completions in zip(shown, answers, strict=True):
        scores = [score(c.text, truth, prompt.scale, config.rewards, config.think) for c in completions]
        rewards = torch.tensor([s.rewards["total"] for s in scores], dtype=torch.float64)  # (G,)
        advantages = group_advantages(rewards, config.scale_rewards)
        groups.append(Group(samples[k], truth, prompt, completions, scores, advantages))
    return groups


def questions(
    policy: Policy, samples: list[Sample], clips: Clips, config: Config
) -> list[tuple[int, Truth, Prompt]]:
    """(index, truth, prompt) of those samples whose videos can be read (all, unless on_bad_video: skip). The
    truth is that of the steps that the video shows."""
    shown = []
    for k, sample in enumerate(samples):
        frames = clips.frames(sample)
        if frames is None:
            continue
        num_steps = config.text_format.num_steps(len(frames))
        truth = sample.truth(config.text_format.step_seconds).before(num_steps)
        if truth is None:
            clips.reject(f"{sample.video}: ends before the event of {sample.id!r} begins")
            continue
        if num_steps < sample.grid(config.text_format.step_seconds).num_steps:
            clips.say_once(f"{sample.video}: ends early; the {num_steps} steps that exist are used")
        shown.append((k, truth, make_prompt(policy, sample, frames, config.text_format)))
    return shown


def improve(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    config: Config,
) -> dict[str, float]:
    """updates_per_batch optimiser steps on the groups, accumulated over rollout_batch groups at a time.
    Returns the metrics of the last one."""
    parts = [groups[k : k + config.rollout_batch] for k in range(0, len(groups), config.rollout_batch)]
    masks = [completion_mask([len(c.ids) for g in part for c in g.completions]) for part in parts]
    normalizer = sum(loss_normalizer(m, config.loss_aggregation, config.max_new_tokens) for m in masks)
    old_logprobs, ref_logprobs = [None] * len(parts), [None] * len(parts)
    for update in range(config.updates_per_batch):
        totals: dict[str, float] = {}
        for k, part in enumerate(parts):
            prompts, completions = [g.prompt for g in part], [[c.ids for c in g.completions] for g in part]
            batch = pack_completions(policy, prompts, completions)
            logprobs = completion_logprobs(policy, batch, config.temperature)  # (R, C), R answers in the part
            if update == 0:
                old_logprobs[k] = logprobs.detach()  # nothing has been updated yet: the sampling policy's own
                if reference is not None:
                    with torch.no_grad():
                        ref_logprobs[k] = completion_logprobs(reference, batch, config.temperature)
            loss, metrics = policy_loss(
                logprobs,
                old_logprobs[k],
                ref_logprobs[k],
                torch.cat([group.advantages for group in part]).to(logprobs.device),
                batch.mask,
                clip_eps=config.clip_eps,
                kl_beta=config.kl_beta,
                normalizer=normalizer,
                aggregation=config.loss_aggregation,
            )
            loss.backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                old = totals.get(name, 0.0)
                totals[name] = max(old, float(value)) if name == "ratio_max" else old + float(value)
        ids = [group.sample.id for group in groups]
        totals["grad_norm"] = optimizer_step(policy, optimizer, config, totals["loss"], ids)
    return totals


def pass_over(samples: list[Sample], step: int, clips: Clips) -> None:
    """A batch of which no video could be read (on_bad_video: skip) teaches nothing. Raises VideoError if it
    is the first one: then it is the folder, more likely than each of them."""
    what = f"none of the {len(samples)} videos of step {step + 1} can be read, such as {samples[0].video}"
    if step == 0:
        raise VideoError(f"{what}; is `videos` the right folder?")
    clips.say_once(f"skipped: {what}")


def supervise(policy: Policy, samples: list[Sample], clips: Clips, config: Config, run: Path) -> None:
    """Supervised fine-tuning: raise the log-probability of the true answer (Table 5, "SFT")."""
    optimizer = adamw(policy, config.sft.learning_rate, config)
    for step in trange(config.sft.steps, desc="SFT", unit="step"):
        size = config.sft.batch_size
        batch, following = (batch_of(samples, size, n, config.seed) for n in (step, step + 1))
        clips.ahead(batch + following)
        shown = questions(policy, batch, clips, config)
        prompts = [prompt for _, _, prompt in shown]
        if not shown:
            pass_over(batch, step, clips)
            continue
        answers = [[true_completion(policy, truth, prompt, config)] for _, truth, prompt in shown]
        tokens, total = sum(len(ids) for (ids,) in answers), 0.0
        for first in range(0, len(prompts), config.rollout_batch):
            part = slice(first, first + config.rollout_batch)
            packed = pack_completions(policy, prompts[part], answers[part])
            loss = -completion_logprobs(policy, packed, temperature=1.0).sum() / tokens  # mean over tokens
            loss.backward()
            total += loss.item()
        norm = optimizer_step(policy, optimizer, config, total, [sample.id for sample in batch])
        log({"phase": "sft", "step": step + 1, "loss": total, "grad_norm": norm}, run)


def true_completion(policy: Policy, truth: Truth, prompt: Prompt, config: Config) -> list[int]:
    """The tokens of the answer that tells the truth, the end token included."""
    text = format_answer(truth_answer(truth, prompt.scale, config.think))
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.end_id]


# ----------------------------------------------------------------------------------------------------------
# The parts of a step


def batch_of(samples: list[Sample], batch_size: int, step: int, seed: int) -> list[Sample]:
    """The samples of optimiser step `step`: the split in a new order each epoch, epoch after epoch."""
    batch = []
    for n in range(step * batch_size, (step + 1) * batch_size):
        epoch, k = divmod(n, len(samples))
        batch.append(samples[_order(len(samples), seed, epoch)[k]])
    return batch


@functools.cache
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def adamw(policy: Policy, learning_rate: float, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, config: Config, loss: float, ids: list[str]
) -> float:
    """Clip the gradient, step, clear it; returns its norm before clipping. Raises FloatingPointError with the
    ids of the batch, and leaves the weights alone, where loss or gradient are not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"loss {loss}, gradient norm {norm} on the batch {', '.join(ids)}; lower learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def freeze(policy: Policy) -> Policy:
    """The reference of the KL: a copy that never changes."""
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    return dataclasses.replace(policy, model=model)


# ----------------------------------------------------------------------------------------------------------
# Evaluation, logs and the run folder


def evaluate_split(
    policy: Policy,
    samples: list[Sample],
    clips: Clips,
    config: Config,
    path: Path,
    name: str,
    fingerprint: str = "",
) -> dict[str, float]:
    """Decode the held-out split, write the predictions, return the paper's row. fingerprint: by which
    evaluate.py knows the answers of a checkpoint that is kept."""
    numbered = list(enumerate(samples))
    predictions = [p for records in decode(policy, numbered, clips, config, name) for p in records]
    if fingerprint:
        predictions = [{**prediction, "fingerprint": fingerprint} for prediction in predictions]
    write_jsonl(predictions, path)
    return score_predictions(predictions, samples, config)["native"]


def summarize_groups(groups: list[Group]) -> dict[str, float]:
    """What a step's rollouts looked like. README, "Glossary", says what healthy looks like for each."""
    scores = [scored for group in groups for scored in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    totals = np.array([[s.rewards["total"] for s in group.scores] for group in groups])  # (prompts, G)
    spread = totals.std(axis=1, ddof=1)  # (prompts,)
    terms = {term: float(np.mean([s.rewards[term] for s in scores])) for term in TERMS}
    watch = {name: float(np.mean([s.diagnostics[name] for s in scores])) for name in scores[0].diagnostics}
    return {
        "reward": float(totals.mean()),
        "reward_std": float(spread.mean()),  # within a group: what the advantages are made of
        "zero_spread": float((spread < 1e-6).mean()),
        **terms,
        **watch,
        "length": float(np.mean([len(c.ids) for c in completions])),
        "truncated": float(np.mean([c.truncated for c in completions])),
    }


def rollout_records(groups: list[Group], step: int, config: Config) -> list[dict]:
    """One record for each sampled answer; also the input of the reward bench."""
    records = []
    for group in groups:
        for g, (completion, scored) in enumerate(zip(group.completions, group.scores, strict=True)):
            scale = group.prompt.scale
            record = {"step": step, "id": group.sample.id, "generation": g}
            record |= answer_record(completion.text, scored.answer, group.truth, scale, config.think)
            record |= {"rewards": scored.rewards, "advantage": float(group.advantages[g])}
            record |= {"length": len(completion.ids), "truncated": completion.truncated}
            records.append(record)
    return records


def start_run(config: Config) -> Path:
    """A new, empty output_dir with the settings and versions in it. An earlier run there is moved aside.
    Raises ConfigError where something else stands there."""
    run = Path(config.output_dir)
    if (run / "config.yaml").is_file():
        number = next(n for n in itertools.count(1) if not Path(f"{run}.{n}").exists())
        run.rename(f"{run}.{number}")
        print(f"{run} held an earlier run: moved to {run}.{number}")
    elif run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise ConfigError(f"output_dir: {run} exists and is no run of train.py; choose another")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    packages = (torch, transformers, decord, np)  # by module: decord2 installs the module decord, too
    versions = {package.__name__: package.__version__ for package in packages}
    write_json({"python": platform.python_version(), **versions}, run / "versions.json")
    return run


def describe(config: Config, policy: Policy, train_samples: list[Sample], eval_samples: list[Sample]) -> str:
    """The derived sizes, so that a wrong setting is seen before it costs a day."""
    parameters = sum(p.numel() for p in policy.model.parameters()) / 1e6
    answers = config.batch_size * config.num_generations
    epochs = config.steps * config.batch_size / len(train_samples)
    return (
        f"{config.model}: {parameters:.2f} M parameters on {policy.device},"
        f" {torch.get_num_threads()} thread(s)\n"
        f"{len(train_samples)} sentences to train on, {len(eval_samples)} held out; {config.steps} steps of "
        f"{config.batch_size} prompts x {config.num_generations} = {answers} answers, {epochs:.1f} epochs\n"
        f"{coordinates_note(policy, config)}"
    )


def log(metrics: dict, run: Path) -> None:
    write_jsonl([metrics], run / "metrics.jsonl", append=True)


def write_json(value: dict, path: Path) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def draw_pictures(run: Path) -> str:
    """Curves and contact sheets where matplotlib is installed; says where they are, or how to get them."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"for pictures: pip install -r requirements-dev.txt && python visualize.py {run}"
    import visualize

    return "pictures: " + ", ".join(str(path) for path in visualize.draw_run(run))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit()
    run_script(
        lambda: main(sys.argv[1:]),
        "output_dir",
        "free some space, or choose another output_dir",
        "stopped: what had been logged is in output_dir; this version does not resume",
    )
