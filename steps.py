"""The parts of an optimiser step, the same whether answers are imitated (sft.py) or sampled and compared
(train.py): whose turn it is, what is asked, the gradient of a batch that is spread over ranks, the step."""

import contextlib
import functools
import math
from pathlib import Path

import numpy as np
import torch

from config import Config
from model import Prompt, make_prompt
from qwen.checkpoint import Policy
from runtime import distributed
from runtime.logs import Clock
from samples import Sample, Truth
from video.frames import VideoError
from video.loader import FrameLoader

clock = Clock()  # where the time of this process goes; of train.py, sft.py and job.py, too


def questions(
    policy: Policy, samples: list[Sample], clips: FrameLoader, config: Config
) -> list[tuple[int, Truth, Prompt]]:
    """(index, truth, prompt) of those samples whose videos can be read (all, unless on_bad_video: skip). The
    truth is that of the steps that the video shows."""
    shown = []
    for k, sample in enumerate(samples):
        with clock("decode"):
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


def batch_of(samples: list[Sample], batch_size: int, step: int, seed: int) -> list[Sample]:
    """The samples of optimiser step `step`: the split in a new order each epoch, epoch after epoch."""
    batch = []
    for n in range(step * batch_size, (step + 1) * batch_size):
        epoch, k = divmod(n, len(samples))
        batch.append(samples[_order(len(samples), seed, epoch)[k]])
    return batch


def own_part(batch: list[Sample]) -> list[tuple[int, Sample]]:
    """This rank's part of a batch, each sample with its place in the batch: neighbours, so that the parts of
    all ranks, one after the other, are the batch."""
    rank, ranks = distributed.init()
    size = len(batch) // ranks
    return list(enumerate(batch))[rank * size : (rank + 1) * size]


@functools.cache
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def cut(items: list, size: int) -> list[list]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def gathered(items: list) -> list:
    """The items of all ranks, in their order, on every rank."""
    return [item for part in distributed.all_gather(items) for item in part]


def micro_batches(items: list, config: Config) -> list[tuple[list, bool]]:
    """This rank's items, micro_batch at a time, each part with True. All ranks get equally many, since they
    must enter a sharded model together: one that has fewer (on_bad_video: skip) goes through another's first
    item, for nothing: False."""
    parts = [(part, True) for part in cut(items, config.micro_batch)]
    counts = distributed.all_gather(len(parts))
    if min(counts) < max(counts):
        donor = counts.index(max(counts))
        rank, _ = distributed.init()
        spare = distributed.broadcast(items[:1] if rank == donor else None, donor)
        parts += [(spare, False)] * (max(counts) - len(parts))
    return parts


def backward(loss: torch.Tensor, policy: Policy, last: bool, config: Config) -> None:
    """Add to the gradients. loss: this rank's part of a sum over all ranks and parts, divided by the tokens
    (grpo.loss_normalizer) of the whole batch already. last: part of the step."""
    distributed.sync_gradients(policy.model, last or config.sync_gradients == "every")
    _, ranks = distributed.init()
    (loss * ranks).backward()  # FSDP2 takes the mean of the ranks' gradients


def adamw(policy: Policy, learning_rate: float, config: Config) -> torch.optim.Optimizer:
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, config: Config, loss: float) -> float:
    """Clip the gradient, step, clear it; returns its norm before clipping. Raises FloatingPointError, on all
    ranks, and leaves the weights alone, where the loss of the global batch or its gradient is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    norm = float(norm.full_tensor() if distributed.is_sharded(policy.model) else norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}; lower learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextlib.contextmanager
def dump_of_nonfinite(batch: list[dict], run: Path, name: str):
    """A FloatingPointError, which all ranks must raise, gets the ids of the global batch, and each rank
    leaves its part of that in RUN/nonfinite_NAME.rankN.pt, for torch.load. batch: this rank's, with "id"."""
    try:
        yield
    except FloatingPointError as error:
        rank, _ = distributed.init()
        torch.save(batch, run / f"nonfinite_{name}.rank{rank}.pt")
        ids = gathered([item["id"] for item in batch])
        raise FloatingPointError(
            f"{name.replace('_', ' ')}: {error}. The batch was {', '.join(ids)}; it is kept in"
            f" {run}/nonfinite_{name}.rank*.pt"
        ) from error


def pass_over(samples: list[Sample], step: int, clips: FrameLoader) -> None:
    """A batch of which no video could be read (on_bad_video: skip) teaches nothing. Raises VideoError if it
    is the first one: then it is the folder, more likely than each of them."""
    what = f"none of the {len(samples)} videos of step {step + 1} can be read, such as {samples[0].video}"
    if step == 0:
        raise VideoError(f"{what}; is `videos` the right folder?")
    clips.say_once(f"skipped: {what}")
