"""What surrounds the training loop: the run's folder, its evaluations and checkpoints, its end."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config, ConfigError, load_config, save_config
from evaluate import coordinates_note, decode_split, score_predictions
from metrics import format_table
from qwen.checkpoint import Policy
from runtime import checkpoints, distributed, logs
from runtime.checkpoints import Progress
from runtime.files import read_jsonl
from runtime.fingerprints import settings_of
from runtime.logs import Log
from runtime.predictions import fingerprint_of
from samples import Sample
from steps import clock
from video.loader import FrameLoader


@dataclass
class Job:
    """What all parts of a run work with."""

    config: Config
    run: Path  # output_dir
    policy: Policy
    clips: FrameLoader
    log: Log | None  # of the first rank
    stop: distributed.Stop
    marks: dict  # what identifies the run (marks.py)
    found: Path | None  # the checkpoint that it goes on from
    progress: Progress


class Stopped(Exception):
    """A signal has asked for an end, and all ranks agree."""


@contextlib.contextmanager
def open_run(config: Config, marks: dict) -> Iterator[tuple[Path, Path | None, Progress]]:
    """output_dir, new or, with resume: auto, as it was when its last whole checkpoint was written; that
    checkpoint, if there is one; where the run stands. Within it no other process can open it. Raises
    ConfigError, and changes nothing, where another run stands or works there."""
    run, (rank, _) = Path(config.output_dir), distributed.init()
    found, progress = None, Progress()
    there = distributed.broadcast((run / "config.yaml").is_file(), 0)  # the first rank may soon make it
    again = config.resume == "auto" and there
    if again:
        found = checkpoints.last_checkpoint(run)
    if found:
        checkpoints.refuse_other(found, config, marks)
        progress = found.progress
    elif again:  # it ended before its first checkpoint, and begins again in its place; or it is another run
        again = settings_of(load_config(run / "config.yaml")) == marks["settings"]

    locks = []
    try:
        if rank == 0:
            if there:
                locks.append(locked(run))
            if again:
                checkpoints.cut_back(run, progress)  # which may refuse, too
                checkpoints.tidy(run)
                answers = run / "predictions.jsonl"
                ended = found and found.folder.with_suffix("").name == "checkpoint"
                if ended and progress.step < config.steps and answers.exists():  # it gets more steps now
                    answers.replace(run / f"predictions_{progress.step}.jsonl")
                if progress.step < config.steps:  # it tells of an earlier end
                    (run / "summary.json").unlink(missing_ok=True)
                save_config(config, run / "config.yaml")
            else:
                logs.start_run(config)
                locks.append(locked(run))
        distributed.barrier()
        yield run, found and found.folder.with_suffix(""), progress  # tidy has taken NAME.old back
    finally:
        for lock in locks:  # also of the folder that was moved aside
            os.close(lock)


def locked(run: Path) -> int:
    """A hold on a run's folder, which ends with this process or os.close. Raises ConfigError where another
    process has it."""
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ConfigError(f"output_dir: a run is at work in {run}; wait for it, or choose another") from None
    return folder


def describe(
    config: Config, policy: Policy, ranks: int, train_samples: list[Sample], eval_samples: list[Sample]
) -> str:
    """The derived sizes, so that a wrong setting is seen before it costs a day."""
    parameters = list(policy.model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    answers = config.batch_size * config.num_generations
    epochs = config.steps * config.batch_size / len(train_samples)
    share = f" ({trained / 1e6:.2f} M of them trained)" if trained < count else ""
    ranked = f", {config.batch_size // ranks} prompts on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"{config.model}: {count / 1e6:.2f} M parameters{share} on {policy.device},"
        f" {config.precision}, {torch.get_num_threads()} thread(s)\n"
        f"{len(train_samples)} sentences to train on, {len(eval_samples)} held out; {config.steps} steps of "
        f"{config.batch_size} prompts x {config.num_generations} = {answers} answers, {epochs:.1f} epochs"
        f"{ranked}\n"
        f"{coordinates_note(policy, config)}"
    )


def evaluate_split(job: Job, samples: list[Sample], when: str) -> dict[str, float]:
    """Decode the held-out split, shared among the ranks, write and log the paper's row, and return it. when:
    before | step | after. A second start decodes what is missing. Raises Stopped."""
    config, run, progress, policy = job.config, job.run, job.progress, job.policy
    names = {"before": "predictions_before.jsonl", "after": "predictions.jsonl"}
    path = run / names.get(when, f"predictions_{progress.step}.jsonl")
    # By which the answers of other weights are told apart; of the last ones evaluate.py must know them, too.
    fingerprint = fingerprint_of(str(run / "checkpoint" if when == "after" else config.model), config)
    if when != "after":
        fingerprint += f"+{progress.sft_step}+{progress.step}"
    with distributed.unsharded(policy.model):
        predictions = decode_split(policy, samples, job.clips, config, path, fingerprint, job.stop)
    if predictions is None:
        raise Stopped
    scores = score_predictions(predictions, samples, config)["native"]
    if job.log:
        job.log.write({"phase": "eval", "step": progress.step, **scores})
        logs.send_answers(job.log, path.name, progress.step)
    best = -1 if progress.best is None else progress.best["m_vIoU"]
    if when != "before" and config.eval_every and scores["m_vIoU"] > best:
        best = {"step": progress.step, "m_vIoU": scores["m_vIoU"]}
        job.progress = dataclasses.replace(progress, best=best)
        checkpoints.replace_best(run, policy, progress.step)
        if when == "after":
            checkpoints.note_best(run / "checkpoint", best)
    return scores


def usage(tokens: float) -> dict:
    """What a step took, of which `tokens` completion tokens came, on all ranks: seconds by part, the mean of
    the ranks; the largest peak of memory."""
    splits = distributed.all_gather(clock.lap())
    seconds = {part: float(np.mean([split[part] for split in splits])) for part in splits[0]}
    return {
        "tokens_per_second": tokens / seconds["step"],
        "peak_memory": distributed.all_reduce_max(logs.peak_memory()),
        "seconds": seconds,
    }


def save(job: Job, optimizer: torch.optim.Optimizer, name: str) -> None:
    """A checkpoint of this moment, from which resume: auto goes on; older ones go
    (config.keep_checkpoints)."""
    checkpoints.save(job.run / name, job.policy, optimizer, job.progress, job.marks)
    taught = f"checkpoint_sft_{job.config.sft.steps}"  # the reference, to which a later start must come back
    checkpoints.prune(job.run, job.config.keep_checkpoints, spare=[job.run / taught])


def standing(progress: Progress) -> str:
    if progress.sft_step and not progress.step:
        return f"step {progress.sft_step} of the supervised phase"
    return f"step {progress.step}"


@contextlib.contextmanager
def saved_when_stopped(job: Job, optimizer: torch.optim.Optimizer):
    """Where the run is stopped in it, or comes to what is not finite, a checkpoint is there from before."""
    try:
        yield
    except (Stopped, FloatingPointError) as error:
        # An earlier update of the same batch has changed the weights; and before any step there is nothing.
        half = isinstance(error, FloatingPointError) and job.config.updates_per_batch > 1
        if half or not (job.progress.sft_step or job.progress.step):
            raise
        phase = f"sft_{job.progress.sft_step}" if not job.progress.step else str(job.progress.step)
        save(job, optimizer, f"checkpoint_{phase}")
        raise


def report(run: Path, before: dict, after: dict, seconds: float) -> None:
    """What the run has come to, on the terminal and in summary.json."""
    steps = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "grpo"]
    rewards = [m["reward"] for m in steps]
    few = max(1, len(rewards) // 10)  # a single step's mean is noise
    first, last = (float(np.mean(part)) if part else None for part in (rewards[:few], rewards[-few:]))
    reward = {"first": first, "last": last}
    summary = {"before": before, "after": after, "reward": reward, "seconds": seconds}
    logs.write_json(summary, run / "summary.json")
    print(format_table({"before": before, "after": after}))
    if rewards:
        print(f"mean sampled reward, first and last {few} of {len(rewards)} steps: {first:.2f} -> {last:.2f}")
    print(f"{seconds:.0f} s; everything is in {run}/; {logs.draw_pictures(run)}")
