"""Ranks: the processes that `torchrun --nproc_per_node=N` starts, and a model that is shared out among them.

Without torchrun there is one rank, 0. In fp32 it trains the plain module. In bf16, or with more ranks, each
decoder layer, each vision block, and what is left over (the root: embeddings and head) is a group of
FSDP2 (`fully_shard`): every rank keeps its part of the group's fp32 weights, gradients and Adam states;
the whole group exists, in the compute dtype, only while it computes. A sharded model may only be entered by
its forward or by `policy.Policy.run`, which gather the root; sampling gathers everything once.
"""

import contextlib
import datetime
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from runtime.files import UserError

# For the slowest rank: its answers may be longer, its disk slower. One that died is noticed at once, by
# torchrun and by whoever talks to it; this is for one that hangs.
TIMEOUT = datetime.timedelta(hours=1)
# FSDP2 warns of outputs that are views (those of model.encode): they must not be changed in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


# ----------------------------------------------------------------------------------------------------------
# Ranks


def init() -> tuple[int, int]:
    """This process's rank, and the number of ranks; the first call meets the others."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        # Under a name of its own for each start: torchrun --max-restarts keeps the addresses of dead ranks.
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        _meet(dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), rank, size)
    return rank, size


def _meet(store: dist.Store, rank: int, size: int) -> None:
    """Numbers and Python objects go by gloo, tensors of a GPU by NCCL."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)


def barrier() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        all_reduce_sum(0)  # by gloo, as all below: a barrier of NCCL would occupy the GPU


def destroy() -> None:
    """Part from the other processes: nobody waits any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> str:
    """This rank's own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def all_reduce_sum(value: float) -> float:
    """The sum of a number over all ranks: on every rank the same, to the last bit."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item()


def all_reduce_max(value: float) -> float:
    """The largest over all ranks."""
    return max(all_gather(value))


def all_gather(value: object) -> list:
    """What each rank has, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_list(items: list) -> list:
    """The items of all ranks, in the order of the ranks, on every rank."""
    return [item for part in all_gather(items) for item in part]


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """An error in this block that a user can mend, or that ends the run with a checkpoint
    (FloatingPointError), is raised on every rank, so that none waits for one that has ended."""
    error = None
    try:
        yield
    except (UserError, FloatingPointError) as problem:
        error = problem
    for problem in filter(None, all_gather(error)):
        raise problem


def equal_parts(items: list, size: int) -> list[tuple[list, float]]:
    """This rank's items, `size` at a time, each part with weight 1.0.

    Every rank gets equally many parts, because ranks must enter a sharded model together: one that has fewer
    borrows another rank's first item, with weight 0.0.
    """
    parts = [(items[k : k + size], 1.0) for k in range(0, len(items), size)]
    counts = all_gather(len(parts))
    if min(counts) < max(counts):
        donor = counts.index(max(counts))
        borrowed = broadcast(items[:1], donor)
        parts += [(borrowed, 0.0)] * (max(counts) - len(parts))
    return parts


def broadcast(value: object, source: int) -> object:
    """What the rank `source` has, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def on_rank0(function: Callable[[], object]) -> object:
    """What it returns, or raises of what a user can mend, on rank 0: on every rank."""
    value = error = None
    if init()[0] == 0:
        try:
            value = function()
        except (OSError, UserError) as problem:
            error = problem
    value, error = broadcast((value, error), 0)
    if error is not None:
        raise error
    return value


class Stop:
    """Within it SIGTERM and Ctrl-C only ask for an end, so that what is at hand is finished first. A second
    one is obeyed at once."""

    def __init__(self):
        self.asked = False  # of this rank; the signal comes to each at another moment

    def __enter__(self) -> "Stop":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self.__exit__()
        if init()[0] == 0:  # print may be in the midst of something
            os.write(2, b"\nstopping after this step (a second signal stops at once)\n")

    def agreed(self) -> bool:
        """Whether any rank was asked: for all ranks to call, who then stop together."""
        return bool(all_reduce_max(self.asked))


# ----------------------------------------------------------------------------------------------------------
# Sharding


def to_device(model: nn.Module, compute: torch.dtype) -> None:
    """Move a model to this rank's device, in place: parameters that are trained in fp32, others in the dtype
    `compute`."""
    _convert(model, compute)
    model.to(device())


def _convert(module: nn.Module, compute: torch.dtype) -> None:
    """Only the dtypes of place."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):  # those of blocks that are sharded already
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)


def shard(model: nn.Module, blocks: Iterable[nn.Module], compute: torch.dtype) -> None:
    """As place, but each rank has a part only, and everything computes in `compute`. blocks: the model's
    layers, each a group of FSDP2. From then on the model is entered by model(...), or by Policy.run, which
    calls model.run (policy._run), which is registered here as another forward: both gather the root first.

    A group is converted, moved and cut before the next one is touched, so that a checkpoint that is mapped
    from its files takes the memory of one group, and never all of it on each rank.
    """
    _, size = init()
    if not dist.is_initialized():
        _meet(dist.HashStore(), 0, 1)  # a world of one
    mesh = init_device_mesh(torch.device(device()).type, (size,))
    # Inputs as they are: the vision tower's rotary tables are fp32 in the plain module, too.
    precision = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*blocks, model]:
        _convert(module, compute)
        # Not resharded, the root would be kept after its forward, and be stale after the step.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    register_fsdp_forward_method(model, "run")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it every rank has all weights of a sharded model, in the compute dtype, gathered once: ranks may
    then sample answers of any length, for nothing has to be exchanged."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward passes exchange gradients among the ranks; where not, they add up on each."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)


def full_state(model: nn.Module, dtype: torch.dtype, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """name -> the whole tensor, in this dtype, on rank 0; {} on the others. All ranks must call it."""
    rank, _ = init()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {}
    for name, tensor in model.state_dict().items():
        if trained_only and name in frozen:
            continue
        tensor = tensor.detach().to(dtype)  # before it is gathered: half the memory and traffic
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if rank == 0:
            state[name] = tensor.cpu()
    return state
