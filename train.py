"""Train a Qwen-VL to answer "when and where?" with boxes: STVG-o1, reinforcement fine-tuning by GRPO.

    torchrun train.py                                      the embedded default: configs/toy.yaml
    torchrun train.py configs/hcstvg_v1.yaml steps=500     another configuration, settings replaced
    torchrun train.py configs/toy.yaml configs/ablations/l1_only.yaml    files over files
    torchrun --nproc_per_node=8 train.py CONFIG            on eight GPUs, the same steps
    torchrun train.py CONFIG resume=auto                   resume a run that was stopped or killed

Evaluate; fine-tune on true answers if `sft.steps` says so; then `steps` times sample, score, compare,
improve,
log; evaluate again. Everything goes to output_dir:

    config.yaml, versions.json       all settings; versions of the packages
    metrics.jsonl                    one line an optimiser step, and one an evaluation
    rollouts.jsonl                   one line a sampled answer (`python rewards.py` reads it)
    predictions_before.jsonl, predictions.jsonl    greedy answers on the held-out split
    checkpoint/                      the trained model, as Hugging Face's from_pretrained reads it
    checkpoint_STEP/, best_STEP/     the same every save_every steps, and of the best evaluation along the way
    summary.json, pictures/          scores before and after; curves, answers and a page (where matplotlib is)

SIGTERM or Ctrl-C end the run after the step at hand, with a checkpoint. Departures from the paper are the
settings in config.py that say "not in the paper".
"""

import contextlib
import dataclasses
import importlib.util
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from config import Config, ConfigError, load_config
from data import check_videos
from evaluate import answer_record, coordinates_note, decode_split, load_split, score_predictions
from grpo import group_advantages, loss_normalizer, policy_loss
from metrics import format_table
from model import (
    Completion,
    Prompt,
    PromptCache,
    completion_logprobs,
    completion_mask,
    make_prompt,
    pack_completions,
    prefill,
    rollout,
    with_video_features,
)
from prompts import format_answer, truth_answer
from qwen.checkpoint import Policy, freeze, load_trainable
from qwen.lora import check_peft, without_adapters
from rewards import score
from runtime import checkpoints, distributed
from runtime.files import UserError, read_jsonl, run_script
from runtime.logs import clock
from runtime.plugins import load_plugins
from runtime.predictions import fingerprint_of
from runtime.run import Run, Stopped, check_batches, describe, open_run, write_json
from runtime.trackers import check_trackers
from samples import Sample, Truth
from video.loader import FrameLoader, open_loader

ROOT = Path(__file__).parent


def train(
    run: Run, phase: str, reference: Policy | None, samples: list[Sample], held_out: list[Sample]
) -> None:
    """The loop. phase: "grpo" learns from rewards; "sft" is supervised fine-tuning, the same update with the
    true answer as the one completion of each prompt, its advantage 1, and no KL (Table 5)."""
    policy, loader = run.policy, run.loader
    config = sft_config(run.config) if phase == "sft" else run.config
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    run.restore(phase, optimizer)

    # Between steps, `run.steps` evaluates, saves, and ends the run after a signal.
    for step, batch in run.steps(
        phase, samples, config, optimizer, lambda: evaluate_split(run, held_out, "step")
    ):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / max(1, config.warmup_steps))
        batch, truths, prompts = make_prompts(policy, batch, loader, config)  # B of this rank
        if run.nothing_to_learn(step, prompts):
            continue
        if phase == "sft":
            completions = [
                [true_completion(policy, *pair, config)] for pair in zip(prompts, truths, strict=True)
            ]
            advantages = [torch.ones(1)] * len(prompts)
            metrics = update(policy, None, optimizer, prompts, completions, advantages, config)
            run.log_sft(step, metrics, completions)
            continue

        # Sample: G answers to each prompt, which is encoded once for all of them.
        keys = [(config.seed, step, k) for k, _ in batch]  # of the random numbers
        prompts, completions, caches = sample(policy, prompts, keys, config)  # completions[b][g]

        # Score: the paper's five rewards, and yours.
        with clock("score"), distributed.errors_on_all_ranks():
            scores = [
                [score(c.text, truth, prompt.scale, config.rewards, config.think) for c in group]
                for truth, prompt, group in zip(truths, prompts, completions, strict=True)
            ]

        # Compare: each answer with its group (Eq. 11).
        rewards = [torch.tensor([s.rewards["total"] for s in group], dtype=torch.float64) for group in scores]
        advantages = [group_advantages(row, config.scale_rewards) for row in rewards]  # B of (G,)

        # Improve: clipped loss and KL to the reference (Eq. 12).
        metrics = update(policy, reference, optimizer, prompts, completions, advantages, config, caches)

        # Log: metrics.jsonl and rollouts.jsonl.
        run.log_grpo(
            step, metrics, *records(step, batch, truths, prompts, completions, scores, advantages, config)
        )


def make_prompts(
    policy: Policy, batch: list[tuple[int, Sample]], loader: FrameLoader, config: Config
) -> tuple[list[tuple[int, Sample]], list[Truth], list[Prompt]]:
    """The samples of a batch whose videos can be read (all, unless on_bad_video: skip), the truth of each in
    the steps that its video shows, and its prompt."""
    kept, truths, prompts = [], [], []
    for k, sample in batch:
        with clock("decode"):
            frames = loader.frames(sample)  # (T, h, w, 3)
        if frames is None:
            continue
        num_steps = config.text_format.num_steps(len(frames))
        truth = sample.truth(config.text_format.step_seconds).before(num_steps)
        if truth is None:
            loader.reject(f"{sample.video}: ends before the event of {sample.id!r} begins")
            continue
        if num_steps < sample.grid(config.text_format.step_seconds).num_steps:
            loader.say_once(f"{sample.video}: ends early; the {num_steps} steps that exist are used")
        kept.append((k, sample))
        truths.append(truth)
        prompts.append(make_prompt(policy, sample, frames, config.text_format))
    return kept, truths, prompts


def sample(
    policy: Policy, prompts: list[Prompt], keys: list[tuple], config: Config
) -> tuple[list[Prompt], list[list[Completion]], list[PromptCache] | list[None]]:
    """G completions of each prompt, rollout_batch prompts at a time; and for the update, the prompts with the
    features of a frozen vision tower, and with reuse_prompts their caches (else None)."""
    seen, completions, caches = [], [], []
    with clock("rollout"), distributed.unsharded(policy.model):
        for first in range(0, len(prompts), config.rollout_batch):
            part = with_video_features(policy, prompts[first : first + config.rollout_batch])
            # One by one: the update may group them in another way, and a graph lives for one backward pass.
            new = [prefill(policy, [prompt])[0] for prompt in part] if config.reuse_prompts else None
            completions += rollout(
                policy,
                part,
                config.num_generations,
                config.max_new_tokens,
                config.temperature,
                keys[first : first + config.rollout_batch],
                new,
            )
            seen += part
            caches += new or [None] * len(part)
    return seen, completions, caches


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    prompts: list[Prompt],
    completions: list[list[Completion]],
    advantages: list[torch.Tensor],
    config: Config,
    caches: list[PromptCache | None] | None = None,
) -> dict[str, float]:
    """updates_per_batch optimiser steps on the global batch, of which this rank has B prompts with G
    completions each. Gradients are accumulated over micro_batch prompts at a time. Returns the metrics of the
    last step.

    advantages: B of (G,). reference: for the KL; with LoRA the policy itself, its adapters switched off.
    caches: of the prompts, with gradients. Raises FloatingPointError, and leaves the weights alone, where the
    loss or its gradient is not finite.
    """
    caches = caches or [None] * len(prompts)
    if len(set(distributed.all_gather(len(prompts)))) > 1:
        caches = [None] * len(
            prompts
        )  # ranks enter a sharded model together, and one reads a borrowed prompt
    groups = list(zip(prompts, completions, advantages, caches, strict=True))
    parts = distributed.equal_parts(groups, config.micro_batch)  # all with weight 1, but for borrowed ones
    lengths = [[len(c.ids) for c in group] for group in completions]
    masks = [
        completion_mask([n for group in part for n in group]) for part in chunks(lengths, config.micro_batch)
    ]
    normalizer = sum(loss_normalizer(mask, config.loss_aggregation, config.max_new_tokens) for mask in masks)
    normalizer = distributed.all_reduce_sum(normalizer)
    _, world_size = distributed.init()
    old_logprobs, ref_logprobs = [None] * len(parts), [None] * len(parts)
    for n in range(config.updates_per_batch):
        losses = []  # of each part: its share of the means over the global batch
        for k, (part, weight) in enumerate(parts):
            prompts_, completions_, advantages_, caches_ = zip(*part, strict=True)
            packed = pack_completions(
                policy, list(prompts_), [[c.ids for c in group] for group in completions_]
            )
            if n == 0 and reference is not None:
                with clock("reference"), torch.no_grad(), without_adapters(reference):
                    ref_logprobs[k] = completion_logprobs(reference, packed, config.temperature)  # (R, C)
            with clock("update"):
                caches_ = list(caches_) if n == 0 and caches_[0] else None
                logprobs = completion_logprobs(
                    policy, packed, config.temperature, caches_
                )  # (R, C), R answers
                if n == 0:
                    old_logprobs[k] = (
                        logprobs.detach()
                    )  # nothing is updated yet: these are the sampling policy's
                loss, metrics = policy_loss(
                    logprobs,
                    old_logprobs[k],
                    ref_logprobs[k],
                    torch.cat(advantages_).to(logprobs.device),
                    packed.mask,
                    clip_eps=config.clip_eps,
                    kl_beta=config.kl_beta,
                    normalizer=normalizer,
                    aggregation=config.loss_aggregation,
                )
                distributed.sync_gradients(
                    policy.model, k + 1 == len(parts) or config.sync_gradients == "every"
                )
                (weight * loss * world_size).backward()  # FSDP averages gradients over ranks; this is a sum
            if weight:
                losses.append({name: float(v) for name, v in {"loss": loss.detach(), **metrics}.items()})
        with clock("wait"):
            losses = distributed.all_gather_list(losses)
        totals = {name: sum(part[name] for part in losses) for name in losses[0]}
        totals["ratio_max"] = max(part["ratio_max"] for part in losses)
        with clock("update"):
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
            norm = float(norm.full_tensor() if distributed.is_sharded(policy.model) else norm)
            if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {totals['loss']}, gradient norm {norm}; lower learning_rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return totals | {"grad_norm": norm}


def chunks(items: list, size: int) -> list[list]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def sft_config(config: Config) -> Config:
    """The settings under which `update` maximises the mean log-probability of the true answers' tokens."""
    sft = {
        "steps": config.sft.steps,
        "batch_size": config.sft.batch_size,
        "learning_rate": config.sft.learning_rate,
    }
    same = {"warmup_steps": 0, "kl_beta": 0.0, "temperature": 1.0, "updates_per_batch": 1}
    return dataclasses.replace(config, **sft, **same, loss_aggregation="token-mean")


def true_completion(policy: Policy, prompt: Prompt, truth: Truth, config: Config) -> Completion:
    """The answer that tells the truth, its end token included."""
    text = format_answer(truth_answer(truth, prompt.scale, config.think))
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion([*ids, policy.end_id], text, truncated=False)


def records(
    step, batch, truths, prompts, completions, scores, advantages, config
) -> tuple[list[dict], list[dict]]:
    """For each sampled answer its line of rollouts.jsonl, and its diagnostics (rewards.diagnose)."""
    lines = []
    for (_, sample), truth, prompt, *group in zip(
        batch, truths, prompts, completions, scores, advantages, strict=True
    ):
        for g, (completion, scored, advantage) in enumerate(zip(*group, strict=True)):
            line = {"step": step + 1, "id": sample.id, "generation": g}
            line |= answer_record(completion.text, scored.answer, truth, prompt.scale, config.think)
            line |= {"rewards": scored.rewards, "advantage": float(advantage)}
            lines.append(line | {"length": len(completion.ids), "truncated": completion.truncated})
    return lines, [scored.diagnostics for group in scores for scored in group]


# ----------------------------------------------------------------------------------------------------------
# Around the loop


def main(arguments: list[str]) -> None:
    started = time.time()
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    for word in arguments:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option; settings are written key=value")
    files = [word for word in arguments if "=" not in word] or [str(ROOT / "configs/toy.yaml")]
    config = load_config(files, [word for word in arguments if "=" in word])
    check_trackers(config)
    check_peft(config.lora)
    load_plugins(config.rewards)
    rank, world_size = distributed.init()
    check_batches(config, world_size)
    if config.threads:
        torch.set_num_threads(config.threads)
    samples, _ = load_split(config, config.train_annotations)
    held_out = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
    if config.on_bad_video == "error":
        check_videos(samples + held_out)
    policy = load_trainable(config)
    if rank == 0:
        print(describe(config, policy, samples, held_out))
        print(coordinates_note(policy, config), end="")
    with (
        contextlib.closing(open_loader(config, policy.size_factor)) as loader,
        open_run(config, policy, loader, samples + held_out) as run,
    ):
        learn(run, samples, held_out)
        if rank == 0:
            report(run.folder, time.time() - started)
    distributed.destroy()


def learn(run: Run, samples: list[Sample], held_out: list[Sample]) -> None:
    """Evaluate, fine-tune on true answers if sft.steps says so, learn from rewards, evaluate again."""
    config, policy = run.config, run.policy
    if run.checkpoint is None:  # otherwise its scores are in metrics.jsonl
        evaluate_split(run, held_out, "before")
    if config.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    # The reference is the supervised model: it is copied before the weights of a later checkpoint are loaded.
    if run.progress.sft_step < config.sft.steps:
        train(run, "sft", None, samples, held_out)
    elif config.sft.steps:
        checkpoints.load_weights(run.sft_checkpoint, policy.model)
    reference = None
    if config.kl_beta and config.steps:
        reference = policy if config.lora.rank else freeze(policy, config)
    train(run, "grpo", reference, samples, held_out)
    evaluate_split(run, held_out, "after")


def evaluate_split(run: Run, samples: list[Sample], when: str) -> None:
    """Decode the held-out split, shared among the ranks, and log the paper's row. when: before | step |
    after. A resumed run decodes only what is missing. Raises Stopped."""
    config, step = run.config, run.progress.step
    names = {"before": "predictions_before.jsonl", "after": "predictions.jsonl"}
    path = run.folder / names.get(when, f"predictions_{step}.jsonl")
    # Tells the answers of other weights apart; evaluate.py computes that of the last ones in the same way.
    fingerprint = fingerprint_of(str(run.folder / "checkpoint" if when == "after" else config.model), config)
    if when != "after":
        fingerprint += f"+{run.progress.sft_step}+{step}"
    with distributed.unsharded(run.policy.model):
        predictions = decode_split(run.policy, samples, run.loader, config, path, fingerprint, run.stop)
    if predictions is None:
        raise Stopped
    run.log_eval(score_predictions(predictions, samples, config)["native"], when)


def report(run: Path, seconds: float) -> None:
    """Print the scores before and after; write summary.json and pictures."""
    lines = read_jsonl(run / "metrics.jsonl")
    evaluations = [m for m in lines if m["phase"] == "eval"]
    keys = evaluations[-1].keys() - {"phase", "step"}
    before, after = ({k: v for k, v in m.items() if k in keys} for m in (evaluations[0], evaluations[-1]))
    rewards = [m["reward"] for m in lines if m["phase"] == "grpo"]
    few = max(1, len(rewards) // 10)  # a single step's mean is noise
    first, last = (float(np.mean(part)) if part else None for part in (rewards[:few], rewards[-few:]))
    reward = {"first": first, "last": last}
    write_json({"before": before, "after": after, "reward": reward, "seconds": seconds}, run / "summary.json")
    print(format_table({"before": before, "after": after}))
    if rewards:
        print(f"mean sampled reward, first and last {few} of {len(rewards)} steps: {first:.2f} -> {last:.2f}")
    print(f"{seconds:.0f} s; everything is in {run}/; {draw_pictures(run)}")


def draw_pictures(run: Path) -> str:
    """Draw curves and answers where matplotlib is installed. Says where they are, or how to get them."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"for pictures: pip install -r requirements-dev.txt && python -m lab.pictures {run}"
    from lab.pictures import draw_run  # the only arrow from here to lab/

    try:
        return "pictures: " + ", ".join(str(path) for path in draw_run(run))
    except (OSError, UserError) as error:  # a full disk, annotations that are gone; all else is done
        return f"no pictures: {error}"


if __name__ == "__main__":
    run_script(
        lambda: main(sys.argv[1:]),
        "output_dir",
        "free some space, or choose another output_dir",
        "stopped at once; resume from the last checkpoint with: the same command and resume=auto",
    )
