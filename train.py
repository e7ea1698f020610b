"""Train a Qwen-VL to answer "when and where?" with boxes: STVG-o1, reinforcement fine-tuning by GRPO.

    torchrun train.py                                      the embedded default: configs/toy.yaml
    torchrun train.py configs/hcstvg_v1.yaml steps=500     another configuration, settings replaced
    torchrun train.py configs/toy.yaml configs/ablations/l1_only.yaml    files over files
    torchrun --nproc_per_node=8 train.py CONFIG            on eight GPUs, the same steps (distributed.py)
    torchrun train.py CONFIG resume=auto                   go on where a run was stopped or killed (resume.py)
    python train.py CONFIG --plan                          the memory it takes, on how many GPUs (plan.py)

Evaluate, fine-tune on true answers if `sft` asks for it, then `steps` times: sample, score, compare, improve,
log; evaluate again. Everything goes to output_dir:

    config.yaml, versions.json       all settings, resolved; what the run ran on
    metrics.jsonl                    one line an optimiser step, and one an evaluation
    rollouts.jsonl                   one line a sampled answer (`python rewards.py` reads it)
    predictions_before.jsonl, predictions.jsonl    greedy answers on the held-out split
    checkpoint/                      the trained model, as Hugging Face's from_pretrained reads it
    checkpoint_STEP/, best_STEP/     the same every save_every steps, and of the best evaluation along the way
    summary.json                     scores before and after, the reward, seconds
    pictures/                        curves, answers and a page with both, where matplotlib is installed

SIGTERM or Ctrl-C end it after the step at hand, with a checkpoint. Departures from the paper are the fields
of config.py that say "not in the paper".
"""

import contextlib
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from config import Config, ConfigError, load_config
from data import check_videos
from evaluate import answer_record, load_split
from grpo import group_advantages, loss_normalizer, policy_loss
from lab.memory import print_plan
from model import (
    Completion,
    Prompt,
    PromptCache,
    completion_logprobs,
    completion_mask,
    pack_completions,
    prefill,
    rollout,
    with_video_features,
)
from qwen.checkpoint import Policy, freeze, load_trainable
from qwen.lora import check_peft, without_adapters
from rewards import Score, score
from runtime import checkpoints, distributed
from runtime.files import read_jsonl, run_script, write_jsonl
from runtime.fingerprints import fingerprints
from runtime.logs import DRIFT_STEPS, Log, drifts_apart
from runtime.plugins import load_plugins
from runtime.run import (
    Job,
    Stopped,
    describe,
    evaluate_split,
    open_run,
    report,
    save,
    saved_when_stopped,
    standing,
    usage,
)
from runtime.trackers import check_trackers
from samples import Sample, Truth
from sft import supervise
from steps import (
    adamw,
    backward,
    batch_of,
    clock,
    cut,
    dump_of_nonfinite,
    gathered,
    micro_batches,
    optimizer_step,
    own_part,
    pass_over,
    questions,
    set_learning_rate,
)
from video.loader import FrameLoader, open_loader

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
    encoded: PromptCache | None = (
        None  # what the policy made of the prompt, with gradients, where that is kept
    )


def main(arguments: list[str]) -> None:
    started = time.time()
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    words = [word for word in arguments if word != "--plan"]
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option; there is --plan, and settings are written key=value")
    files = [word for word in words if "=" not in word] or [str(ROOT / "configs/toy.yaml")]
    config = load_config(files, [word for word in words if "=" in word])
    if config.answer_format != "boxes":
        raise ConfigError(f"answer_format: {config.answer_format} is to evaluate only; train with boxes")
    if "--plan" in arguments:
        print_plan(config)
        return
    check_trackers(config)
    check_peft(config.lora)
    load_plugins(config.rewards)
    rank, ranks = distributed.init()
    check_batches(config, ranks)
    if config.threads:
        torch.set_num_threads(config.threads)
    train_samples, _ = load_split(config, config.train_annotations)
    eval_samples = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
    if config.on_bad_video == "error":
        check_videos(train_samples + eval_samples)
    policy = load_trainable(config)
    marks = fingerprints(config, train_samples + eval_samples)
    with contextlib.ExitStack() as stack:
        if ranks == 1:
            stack.callback(distributed.destroy)
        run, found, progress = stack.enter_context(open_run(config, marks))
        if rank == 0:
            print(describe(config, policy, ranks, train_samples, eval_samples), end="")
            if found:
                print(f"going on from {found}")
            elif config.resume == "auto":
                print(f"no checkpoint in {run}: it begins at step 0")
        clips = stack.enter_context(contextlib.closing(open_loader(config, policy.size_factor)))
        log = stack.enter_context(contextlib.closing(Log(run, config))) if rank == 0 else None
        stop = stack.enter_context(distributed.Stop())
        job = Job(config, run, policy, clips, log, stop, marks, found, progress)
        try:
            before, after = learn(job, train_samples, eval_samples)
        except Stopped:
            if rank == 0:
                print(f"stopped after {standing(job.progress)}; go on with: the same command and resume=auto")
        else:
            if rank == 0:
                report(run, before, after, time.time() - started)
    distributed.destroy()


def learn(job: Job, train_samples: list[Sample], eval_samples: list[Sample]) -> tuple[dict, dict]:
    """Evaluate, fine-tune on true answers if `sft` asks for it, learn from rewards, evaluate again: from the
    beginning, or from job.found on. Returns the held-out scores before and after. Raises Stopped."""
    config, model = job.config, job.policy.model
    if job.found is None:  # otherwise it is in metrics.jsonl
        evaluate_split(job, eval_samples, "before")
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()

    # The reference is the supervised model: it is copied before the weights of a later checkpoint come.
    taught = job.run / f"checkpoint_sft_{config.sft.steps}"
    if job.progress.sft_step < config.sft.steps:
        supervise(job, train_samples, taught)
    elif config.sft.steps:
        checkpoints.load_weights(taught, model)

    reference = None
    if config.kl_beta and config.steps:
        reference = job.policy if config.lora.rank else freeze(job.policy, config)
    optimizer = adamw(job.policy, config.learning_rate, config)
    if job.progress.step:
        checkpoints.load(job.found, model, optimizer)
    reinforce(job, reference, optimizer, train_samples, eval_samples)
    after = evaluate_split(job, eval_samples, "after")
    before = next(m for m in read_jsonl(job.run / "metrics.jsonl") if m["phase"] == "eval")
    return {key: value for key, value in before.items() if key in after}, after


def reinforce(
    job: Job,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    train_samples: list[Sample],
    eval_samples: list[Sample],
) -> None:
    """`steps` times: sample, score, compare, improve, log. Leaves the trained model in checkpoint/."""
    config, policy, begin = job.config, job.policy, job.progress.step
    bar = trange(config.steps, initial=begin, desc="GRPO", unit="step", disable=job.log is None)
    recent = []  # (reward, vIoU) of the last steps
    if job.log:
        lines = [m for m in read_jsonl(job.run / "metrics.jsonl") if m["phase"] == "grpo"]
        recent = [(m["reward"], m["viou_pred"]) for m in lines[-DRIFT_STEPS:]]
    with bar, saved_when_stopped(job, optimizer):
        for step in range(begin, config.steps):
            if step and config.eval_every and step % config.eval_every == 0:
                evaluate_split(job, eval_samples, "step")
            clock.lap()
            warmth = min(1, (step + 1) / max(1, config.warmup_steps))
            set_learning_rate(optimizer, config.learning_rate * warmth)
            size = config.batch_size
            batch, following = (batch_of(train_samples, size, n, config.seed) for n in (step, step + 1))
            job.clips.prefetch([sample for _, sample in own_part(batch) + own_part(following)])

            groups = []
            with distributed.unsharded(policy.model):
                for part in cut(own_part(batch), config.rollout_batch):
                    keys = [(config.seed, step, k) for k, _ in part]  # of their random numbers
                    samples = [sample for _, sample in part]
                    groups += sample_and_score(policy, samples, keys, job.clips, config)
            with clock("wait"):
                records = gathered(rollout_records(groups, step + 1, config))
                diagnostics = gathered([s.diagnostics for group in groups for s in group.scores])
            if records:
                with dump_of_nonfinite([contents(group) for group in groups], job.run, f"step_{step + 1}"):
                    metrics = improve(policy, reference, optimizer, groups, config)
                metrics = {**summarize(records, diagnostics, config.num_generations), **metrics}
                metrics |= usage(sum(record["length"] for record in records))
                if job.log:  # now, and not before: a checkpoint that a failing step leaves counts these bytes
                    recent = [*recent, (metrics["reward"], metrics["viou_pred"])][-DRIFT_STEPS:]
                    metrics["drift"] = float(drifts_apart(recent))
                    write_jsonl(records, job.run / "rollouts.jsonl", append=True)
                    job.log.write({"phase": "grpo", "step": step + 1, **metrics})
                    reward, viou = np.mean(recent[-10:], axis=0)
                    warning = " (the reward rises, vIoU falls!)" if metrics["drift"] else ""
                    bar.set_postfix_str(f"reward {reward:.2f}, vIoU {viou:.2f}{warning}", refresh=False)
            else:
                pass_over(batch, step, job.clips)

            done = step + 1
            job.progress = dataclasses.replace(job.progress, step=done)
            bar.update()
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                save(job, optimizer, f"checkpoint_{done}")
            if job.stop.agreed():
                raise Stopped
    # If all steps had been done before this start, it is there.
    if job.progress.step > begin or job.found != job.run / "checkpoint":
        save(job, optimizer, "checkpoint")


# ----------------------------------------------------------------------------------------------------------
# One training step: sample and score, compare, improve


def sample_and_score(
    policy: Policy, samples: list[Sample], keys: list, clips: FrameLoader, config: Config
) -> list[Group]:
    """G answers to each sample's prompt, their rewards, and their advantages within the group. keys: see
    model.rollout."""
    shown = questions(policy, samples, clips, config)
    keys = [keys[k] for k, _, _ in shown]
    with clock("rollout"):
        prompts = with_video_features(policy, [prompt for _, _, prompt in shown])
        # Each by itself: the update may take them in other parts, and a graph lives for one backward pass.
        encoded = [prefill(policy, [prompt])[0] for prompt in prompts] if config.reuse_prompts else None
        answers = rollout(
            policy,
            prompts,
            config.num_generations,
            config.max_new_tokens,
            config.temperature,
            keys,
            encoded,
        )
    groups = []
    with clock("score"):
        kept = encoded or [None] * len(prompts)
        for (k, truth, _), prompt, read, completions in zip(shown, prompts, kept, answers, strict=True):
            scores = [score(c.text, truth, prompt.scale, config.rewards, config.think) for c in completions]
            rewards = torch.tensor([s.rewards["total"] for s in scores], dtype=torch.float64)  # (G,)
            advantages = group_advantages(rewards, config.scale_rewards)
            groups.append(Group(samples[k], truth, prompt, completions, scores, advantages, read))
    return groups


def improve(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    config: Config,
) -> dict[str, float]:
    """updates_per_batch optimiser steps on the groups of all ranks, of which `groups` are this one's,
    accumulated over micro_batch groups at a time. Returns the metrics of the last one.

    reference: the KL's; with LoRA the policy itself, whose adapters are then switched off.
    """
    if config.reuse_prompts and len(set(distributed.all_gather(len(groups)))) > 1:
        # A rank with fewer must read another's prompt, and they go through a sharded model together.
        groups = [dataclasses.replace(group, encoded=None) for group in groups]
    parts = micro_batches(groups, config)
    rows = [
        completion_mask([len(c.ids) for g in part for c in g.completions]) for part, real in parts if real
    ]
    normalizer = sum(loss_normalizer(mask, config.loss_aggregation, config.max_new_tokens) for mask in rows)
    normalizer = distributed.all_reduce_sum(normalizer)
    old_logprobs, ref_logprobs = [None] * len(parts), [None] * len(parts)
    for update in range(config.updates_per_batch):
        shares: list[dict[str, float]] = []  # of each part: its share of the means over the global batch
        for k, (part, real) in enumerate(parts):
            prompts, completions = [g.prompt for g in part], [[c.ids for c in g.completions] for g in part]
            batch = pack_completions(policy, prompts, completions)
            if update == 0 and reference is not None:
                with clock("reference"), torch.no_grad(), without_adapters(reference):
                    ref_logprobs[k] = completion_logprobs(reference, batch, config.temperature)
            with clock("update"):
                kept = [group.encoded for group in part] if update == 0 and part[0].encoded else None
                logprobs = completion_logprobs(policy, batch, config.temperature, kept)  # (R, C), R answers
                if update == 0:
                    old_logprobs[k] = logprobs.detach()  # nothing has been updated yet: the sampling policy's
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
                backward(loss if real else 0 * loss, policy, k == len(parts) - 1, config)
            if real:
                shares.append({name: float(v) for name, v in {"loss": loss.detach(), **metrics}.items()})
        with clock("wait"):
            shares = gathered(shares)
        totals = {name: sum(part[name] for part in shares) for name in shares[0]}
        totals["ratio_max"] = max(part["ratio_max"] for part in shares)
        with clock("update"):
            totals["grad_norm"] = optimizer_step(policy, optimizer, config, totals["loss"])
    return totals


# ----------------------------------------------------------------------------------------------------------
# What a step looked like, what is wrong


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


def summarize(records: list[dict], diagnostics: list[dict], num_generations: int) -> dict[str, float]:
    """What a step's rollouts looked like, of all ranks. README, "Glossary", says what healthy looks like for
    each. diagnostics: rewards.Score.diagnostics of each record."""
    rewards = [record["rewards"] for record in records]
    groups = {  # of each term, and the total: (prompts, G)
        name: np.array([terms[name] for terms in rewards]).reshape(-1, num_generations) for name in rewards[0]
    }
    totals = groups.pop("total")
    spread = totals.std(axis=1, ddof=1)  # (prompts,)
    return {
        "reward": float(totals.mean()),
        "reward_std": float(spread.mean()),  # within a group: what the advantages are made of
        "zero_spread": float((spread < 1e-6).mean()),
        **{name: float(values.mean()) for name, values in groups.items()},
        "std": {name: float(values.std(axis=1, ddof=1).mean()) for name, values in groups.items()},
        **{name: float(np.mean([values[name] for values in diagnostics])) for name in diagnostics[0]},
        "length": float(np.mean([record["length"] for record in records])),
        "truncated": float(np.mean([record["truncated"] for record in records])),
        "prompts": len(spread),  # fewer than batch_size where videos cannot be read
    }


def contents(group: Group) -> dict:
    """What the update learns from."""
    return {
        "id": group.sample.id,
        "video": group.sample.video,
        "prompt_ids": group.prompt.ids,
        "positions": group.prompt.positions,
        "frames": group.prompt.frames,
        "completions": [completion.ids for completion in group.completions],
        "rewards": [scored.rewards for scored in group.scores],
        "advantages": group.advantages,
    }


def check_batches(config: Config, ranks: int) -> None:
    """A group lives on one rank, and all ranks have equally many. Raises ConfigError."""
    for key, size in {"batch_size": config.batch_size, "sft.batch_size": config.sft.batch_size}.items():
        used = config.sft.steps if key.startswith("sft") else config.steps
        if used and size % ranks:
            below = size // ranks * ranks
            nearest = f"{below} or {below + ranks}" if below else str(ranks)
            raise ConfigError(f"{key}: {size} prompts do not divide among {ranks} ranks; {nearest} would")


if __name__ == "__main__":
    run_script(
        lambda: main(sys.argv[1:]),
        "output_dir",
        "free some space, or choose another output_dir",
        "stopped at once; go on from the last checkpoint with: the same command and resume=auto",
    )
