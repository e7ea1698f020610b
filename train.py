"""Train a Qwen-VL to answer "when and where?" with boxes: STVG-o1, reinforcement fine-tuning by GRPO.

    torchrun train.py                                      the embedded default: configs/toy.yaml
    torchrun train.py configs/hcstvg_v1.yaml steps=500     another configuration, settings replaced
    torchrun train.py configs/toy.yaml configs/ablations/l1_only.yaml    files over files
    torchrun --nproc_per_node=8 train.py CONFIG            on eight GPUs, the same steps
    torchrun train.py CONFIG resume=auto                   resume a run that was stopped or killed

Evaluate; fine-tune on true answers if `sft.steps` says so; then, `steps` times, *sample, score, compare,
improve, log*; evaluate again. Everything goes to output_dir:

    config.yaml, versions.json       all settings; versions of the packages
    metrics.jsonl                    one line an optimiser step, and one an evaluation
    rollouts.jsonl                   one line a sampled answer (`python rewards.py` reads it)
    watched.jsonl                    answers sampled to the same three sentences, five times along the way
    predictions_before.jsonl, predictions.jsonl    greedy answers on the held-out split
    checkpoint/                      the trained model, as Hugging Face's from_pretrained reads it
    checkpoint_STEP/, best_STEP/     the same every save_every steps, and of the best evaluation along the way
    summary.json, pictures/          scores before and after; curves, answers and a page (where matplotlib is)

SIGTERM or Ctrl-C end the run after the step at hand, with a checkpoint. `step` is here one of the optimiser;
the steps of a clip occur in make_prompts alone. Departures from the paper: config.py, "not in the paper".
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable

from config import Config, command_line
from runtime.files import UserError, check_first, run_script

if __name__ == "__main__":  # a wrong setting is said before the imports below, which take seconds
    check_first(lambda: command_line(sys.argv[1:], __doc__))

import torch

from data import check_videos
from evaluate import answer_record, coordinates_note, decode_split, load_split, score_predictions, watch
from grpo import group_advantages, loss_normalizer, policy_loss
from metrics import format_table
from model import (
    Completion,
    Prompt,
    completion_logprobs,
    make_prompt,
    pack_completions,
    prefill,
    rollout,
    with_video_features,
)
from prompts import format_answer, truth_answer
from qwen.checkpoint import Policy, freeze, load_trainable
from qwen.lora import without_adapters
from rewards import score
from runtime import checkpoints, distributed
from runtime.logs import clock, final_warnings
from runtime.predictions import fingerprint_of
from runtime.run import Run, Stopped, check_start, describe, open_run
from samples import Sample, Truth
from video.loader import FrameLoader


def train(run: Run, phase: str, reference: Policy | None, samples: list[Sample], evaluate: Callable) -> None:
    """The loop. phase: "grpo", or "sft": supervised fine-tuning (Table 5), which is the same update with the
    true answer as the one completion of each prompt, its advantage 1, and no KL."""
    policy, config = run.policy, sft_config(run.config) if phase == "sft" else run.config
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    run.restore(phase, optimizer)

    # Between two steps `run.steps` evaluates, saves, and ends the run after a signal.
    # batch: this rank's (k, sample), k being the place in the global batch.
    for step, batch in run.steps(phase, config, samples, optimizer, evaluate):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / max(1, config.warmup_steps))
        batch, truths, prompts = make_prompts(policy, batch, run.loader, config)  # B of this rank
        if run.nothing_to_learn(step, prompts):
            continue
        if phase == "sft":
            completions = [[true_completion(policy, *p, config)] for p in zip(prompts, truths, strict=True)]
            advantages = [torch.ones(1)] * len(prompts)
            run.log_sft(step, update(policy, None, optimizer, prompts, completions, advantages, config))
            continue

        # Sample: G answers to each prompt, which is encoded once for all of them.
        keys = [(config.seed, step, k) for k, _ in batch]  # seeds of the random numbers
        prompts, completions = sample_answers(policy, prompts, keys, config)  # completions[b][g]

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
        metrics = update(policy, reference, optimizer, prompts, completions, advantages, config)

        # Log: metrics.jsonl and rollouts.jsonl.
        records = rollout_records(step, batch, truths, prompts, completions, scores, advantages, config)
        run.log_grpo(step, metrics, records, [s.diagnostics for group in scores for s in group])


def make_prompts(
    policy: Policy, batch: list[tuple[int, Sample]], loader: FrameLoader, config: Config
) -> tuple[list[tuple[int, Sample]], list[Truth], list[Prompt]]:
    """The samples of a batch whose videos can be read (all, unless on_bad_video: skip), the truth of each in
    the steps that its video shows, and its prompt."""
    readable, truths, prompts = [], [], []
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
        readable.append((k, sample))
        truths.append(truth)
        prompts.append(make_prompt(policy, sample, frames, config.text_format))
    return readable, truths, prompts


def sample_answers(
    policy: Policy, prompts: list[Prompt], keys: list[tuple], config: Config
) -> tuple[list[Prompt], list[list[Completion]]]:
    """G completions of each prompt, rollout_batch prompts at a time. The prompts come back with what the
    update can reuse: the features of a frozen vision tower and, with reuse_prompts, their caches."""
    encoded, completions = [], []
    with clock("rollout"), distributed.unsharded(policy.model):
        for first in range(0, len(prompts), config.rollout_batch):
            part = with_video_features(policy, prompts[first : first + config.rollout_batch])
            if config.reuse_prompts:  # one by one, since a graph lives for one backward pass
                part = [dataclasses.replace(prompt, cache=prefill(policy, [prompt])[0]) for prompt in part]
            encoded += part
            completions += rollout(
                policy,
                part,
                config.num_generations,
                config.max_new_tokens,
                config.temperature,
                keys[first : first + config.rollout_batch],
                [prompt.cache for prompt in part] if config.reuse_prompts else None,
            )
    return encoded, completions


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    prompts: list[Prompt],
    completions: list[list[Completion]],
    advantages: list[torch.Tensor],
    config: Config,
) -> dict[str, float]:
    """updates_per_batch optimiser steps on the global batch, of which this rank has B prompts with G
    completions each. Returns the metrics of the last step.

    advantages: B of (G,). reference: of the KL; with LoRA the policy itself, whose adapters are then switched
    off. Raises FloatingPointError, and leaves the weights alone, where the loss or its gradient is not
    finite.
    """
    reuse = config.reuse_prompts and len(set(distributed.all_gather(len(prompts)))) == 1
    if not reuse:  # a rank that borrows a prompt (equal_parts) has no cache of it
        prompts = [dataclasses.replace(prompt, cache=None) for prompt in prompts]
    # micro_batch prompts at a time: (groups, weight), the weight being 1 but for a borrowed group's 0
    parts = distributed.equal_parts(
        list(zip(prompts, completions, advantages, strict=True)), config.micro_batch
    )
    packed = [
        pack_completions(policy, [p for p, _, _ in part], [[c.ids for c in group] for _, group, _ in part])
        for part, _ in parts
    ]
    normalizer = distributed.all_reduce_sum(
        sum(
            weight * loss_normalizer(batch.mask, config.loss_aggregation, config.max_new_tokens)
            for batch, (_, weight) in zip(packed, parts, strict=True)
        )
    )
    _, world_size = distributed.init()
    old_logprobs, ref_logprobs = [None] * len(parts), [None] * len(parts)
    for n in range(config.updates_per_batch):
        losses = []  # of each part: its share of the means over the global batch
        for k, (batch, (part, weight)) in enumerate(zip(packed, parts, strict=True)):
            if n == 0 and reference is not None:
                with clock("reference"), torch.no_grad(), without_adapters(reference):
                    ref_logprobs[k] = completion_logprobs(reference, batch, config.temperature)  # (R, C)
            with clock("update"):
                caches = [prompt.cache for prompt, _, _ in part] if reuse and n == 0 else None
                logprobs = completion_logprobs(policy, batch, config.temperature, caches)  # (R, C), R answers
                if n == 0:  # nothing is updated yet: these are the sampling policy's
                    old_logprobs[k] = logprobs.detach()
                loss, metrics = policy_loss(
                    logprobs,
                    old_logprobs[k],
                    ref_logprobs[k],
                    torch.cat([row for _, _, row in part]).to(logprobs.device),
                    batch.mask,
                    clip_eps=config.clip_eps,
                    kl_beta=config.kl_beta,
                    normalizer=normalizer,
                    aggregation=config.loss_aggregation,
                )
                last = k + 1 == len(parts)
                distributed.sync_gradients(policy.model, last or config.sync_gradients == "every")
                (weight * loss * world_size).backward()  # FSDP takes the ranks' mean; the loss is a sum
            if weight:
                losses.append(
                    {"loss": loss.item(), **{name: value.item() for name, value in metrics.items()}}
                )
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
    return totals | {"grad_norm": norm, "tokens": sum(len(c.ids) for group in completions for c in group)}


def sft_config(config: Config) -> Config:
    """The settings under which `update` raises the mean log-probability of the true answers' tokens."""
    own = {key: getattr(config.sft, key) for key in ("steps", "batch_size", "learning_rate")}
    same = {"warmup_steps": 0, "kl_beta": 0.0, "temperature": 1.0, "updates_per_batch": 1}
    return dataclasses.replace(config, **own, **same, reuse_prompts=False, loss_aggregation="token-mean")


def true_completion(policy: Policy, prompt: Prompt, truth: Truth, config: Config) -> Completion:
    """The answer that tells the truth, its end token included; of a longer one the first max_new_tokens."""
    text = format_answer(truth_answer(truth, prompt.scale, config.think))
    ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.end_id]
    return Completion(ids[: config.max_new_tokens], text, truncated=len(ids) > config.max_new_tokens)


def rollout_records(
    step, batch, truths, prompts, completions, scores, advantages, config: Config
) -> list[dict]:
    """A line of rollouts.jsonl for each sampled answer."""
    records = []
    groups = zip(batch, truths, prompts, completions, scores, advantages, strict=True)
    for (k, sample), truth, prompt, *group in groups:
        for g, (completion, scored, advantage) in enumerate(zip(*group, strict=True)):
            records.append(
                {"step": step + 1, "group": k, "id": sample.id, "generation": g}
                | answer_record(completion.text, scored.answer, truth, prompt.scale, config.think)
                | {"rewards": scored.rewards, "advantage": float(advantage)}
                | {"length": len(completion.ids), "truncated": completion.truncated}
            )
    return records


# ----------------------------------------------------------------------------------------------------------
# Around the loop


def main(arguments: list[str]) -> None:
    started = time.monotonic()
    config = command_line(arguments, __doc__)
    rank, _ = distributed.init()
    check_start(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    samples, _ = load_split(config, config.train_annotations)
    held_out = load_split(config, config.eval_annotations)[0][: config.eval_limit or None]
    if config.on_bad_video == "error":
        check_videos(samples + held_out)
    policy = load_trainable(config)
    if rank == 0:
        print(describe(config, policy, samples, held_out))
        print(coordinates_note(policy, config, trains=True), end="")
    with (
        contextlib.closing(FrameLoader(config, policy.size_factor)) as loader,
        open_run(config, policy, loader, samples + held_out, started) as run,
    ):
        learn(run, samples, held_out)
        if rank == 0:
            report(run)
    distributed.destroy()


def learn(run: Run, samples: list[Sample], held_out: list[Sample]) -> None:
    """Evaluate, fine-tune on true answers if sft.steps says so, learn from rewards, evaluate again."""
    config, policy = run.config, run.policy
    evaluate = functools.partial(evaluate_split, run, held_out)
    run.watch = functools.partial(watch, policy, samples, run.loader, config)
    if run.checkpoint is None:  # otherwise its scores are in metrics.jsonl
        evaluate("before")
    if config.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    # The reference is the supervised model: it is copied before the weights of a later checkpoint are loaded.
    if run.progress.sft_step < config.sft.steps:
        train(run, "sft", None, samples, evaluate)
    elif config.sft.steps:
        checkpoints.load_weights(run.sft_checkpoint, policy.model)
    reference = None
    if config.kl_beta and config.steps:
        reference = policy if config.lora.rank else freeze(policy, config)
    train(run, "grpo", reference, samples, evaluate)
    evaluate("after")


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
    run.log_eval(score_predictions(predictions, samples, config)["native"], when, predictions)


def report(run: Run) -> None:
    """Print the scores before and after, and where everything is; draw the pictures."""
    summary = run.write_summary()
    print(format_table({"before": summary["before"], "after": summary["after"]}))
    if summary["reward"]["first"] is not None:
        print(
            "mean sampled reward, first and last tenth of the steps: {first:z.2f} -> {last:z.2f}".format(
                **summary["reward"]
            )
        )
    for line in final_warnings(summary["warnings"], run.config.steps):
        print(line)
    print(f"{summary['seconds']:.0f} s; everything is in {run.folder}/")
    try:
        from lab.pictures import draw_run  # the only arrow from here to lab/

        print("pictures:", *draw_run(run.folder))
    except ImportError:
        print(f"for pictures: pip install -r requirements-dev.txt && python -m lab.pictures {run.folder}")
    except (OSError, UserError) as error:  # a full disk, annotations that are gone; all else is done
        print(f"no pictures: {error}")


if __name__ == "__main__":
    stopped = "stopped at once; resume from the last checkpoint with: the same command and resume=auto"
    run_script(lambda: main(sys.argv[1:]), "output_dir", stopped)
