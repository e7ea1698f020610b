"""Ranks: the processes that `torchrun --nproc_per_node=N` starts. Without torchrun there is one, rank 0."""

import datetime
import os

import torch
import torch.distributed as dist

# A rank may wait hours for one with longer answers; torchrun, not this, ends the job of a rank that died.
PATIENCE = datetime.timedelta(days=7)


def join() -> tuple[int, int]:
    """Meet the other processes. Returns this one's rank and their number."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return rank, size


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Part from the other processes: nobody waits any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> str:
    """This rank's own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
