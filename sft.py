"""Supervised fine-tuning on the true answers, before the reinforcement learning (Table 5, "SFT")."""

import dataclasses
from pathlib import Path

import torch
from tqdm import trange

from config import Config
from model import Prompt, completion_logprobs, pack_completions, with_video_features
from prompts import format_answer, truth_answer
from qwen.checkpoint import Policy
from runtime import checkpoints, distributed
from runtime.run import Job, Stopped, save, saved_when_stopped, usage
from samples import Sample, Truth
from steps import (
    adamw,
    backward,
    batch_of,
    clock,
    dump_of_nonfinite,
    micro_batches,
    optimizer_step,
    own_part,
    pass_over,
    questions,
)


def supervise(job: Job, train_samples: list[Sample], taught: Path) -> None:
    """Raise the log-probability of the true answers (Table 5, "SFT"). Leaves a checkpoint in `taught`, which
    is the reference of what follows (with LoRA that is the base, in which nothing was taught)."""
    config, policy, begin = job.config, job.policy, job.progress.sft_step
    optimizer = adamw(policy, config.sft.learning_rate, config)
    if job.found:
        checkpoints.load(job.found, policy.model, optimizer)
    steps = config.sft.steps
    bar = trange(steps, initial=begin, desc="SFT", unit="step", disable=job.log is None)
    with bar, saved_when_stopped(job, optimizer):
        for step in range(begin, steps):
            clock.lap()
            size = config.sft.batch_size
            batch, following = (batch_of(train_samples, size, n, config.seed) for n in (step, step + 1))
            job.clips.prefetch([sample for _, sample in own_part(batch) + own_part(following)])
            samples = [sample for _, sample in own_part(batch)]
            shown = questions(policy, samples, job.clips, config)
            answered = [
                (prompt, true_completion(policy, truth, prompt, config)) for _, truth, prompt in shown
            ]
            tokens = distributed.all_reduce_sum(sum(len(ids) for _, ids in answered))
            if tokens:
                contents = [
                    {
                        "id": samples[k].id,
                        "prompt_ids": prompt.ids,
                        "frames": prompt.frames,
                        "completion": ids,
                    }
                    for (k, _, _), (prompt, ids) in zip(shown, answered, strict=True)
                ]
                with dump_of_nonfinite(contents, job.run, f"sft_step_{step + 1}"):
                    metrics = imitate(policy, optimizer, answered, tokens, config)
                metrics |= usage(tokens)
                if job.log:
                    job.log.write({"phase": "sft", "step": step + 1, **metrics})
            else:
                pass_over(batch, step, job.clips)
            done = step + 1
            job.progress = dataclasses.replace(job.progress, sft_step=done)
            bar.update()
            if config.save_every and done % config.save_every == 0 and done < steps:
                save(job, optimizer, f"checkpoint_sft_{done}")
            if job.stop.agreed():
                raise Stopped
    save(job, optimizer, taught.name)


def imitate(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    answered: list[tuple[Prompt, list[int]]],
    tokens: float,
    config: Config,
) -> dict[str, float]:
    """One optimiser step on the answers (token ids) to prompts, of this rank; `tokens` of them on all ranks.
    The loss is minus the mean log-probability of a token."""
    total, parts = 0.0, micro_batches(answered, config)
    with clock("update"):
        for k, (part, real) in enumerate(parts):
            prompts = with_video_features(policy, [prompt for prompt, _ in part])
            batch = pack_completions(policy, prompts, [[ids] for _, ids in part])
            loss = -completion_logprobs(policy, batch, temperature=1.0).sum() / tokens
            backward(loss if real else 0 * loss, policy, k == len(parts) - 1, config)
            total += loss.item() if real else 0.0
    with clock("wait"):
        total = distributed.all_reduce_sum(total)
    with clock("update"):
        norm = optimizer_step(policy, optimizer, config, total)
    return {"loss": total, "grad_norm": norm}


def true_completion(policy: Policy, truth: Truth, prompt: Prompt, config: Config) -> list[int]:
    """The tokens of the answer that tells the truth, the end token included."""
    text = format_answer(truth_answer(truth, prompt.scale, config.think))
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.end_id]
