"""Ranks: the processes that `torchrun --nproc_per_node=N` starts, and a model that is sharded over them.

Without torchrun there is one rank, 0. In fp32 it trains the plain module. In bf16, or on several ranks, FSDP2
(`fully_shard`) makes groups: each decoder layer, each vision block, and the rest (the root: embeddings and
head). A rank keeps its part of a group's fp32 weights, gradients and Adam states; it gathers the whole group,
in the compute dtype, only while that computes. Enter a sharded model by its forward or by Policy.run, which
gather the root first. Sampling gathers everything once (`unsharded`).
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from runtime.files import UserError

TIMEOUT = datetime.timedelta(hours=1)  # for a rank that hangs; answers of very different length are no hang
# FSDP2 warns of outputs that are views (those of model.prefill): they must not be changed in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def init() -> tuple[int, int]:
    """Return this process's rank and the number of ranks. The first call connects the ranks."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        # After torchrun --max-restarts the store still has the dead ranks' addresses: use other keys.
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        _connect(dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), rank, size)
    return rank, size


def _connect(store: dist.Store, rank: int, size: int) -> None:
    """Numbers and Python objects go by gloo, tensors on a GPU by NCCL."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)


def destroy() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> str:
    """This rank's GPU, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def barrier() -> None:
    """Wait until all ranks are here."""
    all_gather(None)  # by gloo: a barrier of NCCL would occupy the GPU


def all_reduce_sum(value: float) -> float:
    """The sum of a number over all ranks, the same on every rank to the last bit."""
    return sum(all_gather(value))


def all_reduce_max(value: float) -> float:
    """The largest value of all ranks."""
    return max(all_gather(value))


def all_gather(value: object) -> list:
    """The values of all ranks, in the order of the ranks, on every rank."""
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
    """The value of the rank `source`, on every rank."""
    return all_gather(value)[source]


def on_rank0(function: Callable[[], object]) -> object:
    """Run a function on rank 0. Return its result, or raise its OSError or UserError, on every rank."""
    result = None
    if init()[0] == 0:
        try:
            result = function(), None
        except (OSError, UserError) as error:
            result = None, error
    value, error = broadcast(result, 0)
    if error is not None:
        raise error
    return value


class Stop:
    """In its block SIGTERM and Ctrl-C ask for an end after the step at hand; a second one ends at once."""

    asked = False  # on this rank; a signal reaches the ranks at different moments

    def __enter__(self) -> "Stop":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for n, handler in self._before.items():
            signal.signal(n, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self.__exit__()
        if init()[0] == 0:  # not by print, which the signal may have interrupted
            os.write(2, b"\nstopping after this step (a second signal stops at once)\n")

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. All ranks must call this together."""
        return bool(all_reduce_max(self.asked))


def to_device(model: nn.Module, compute: torch.dtype) -> None:
    """Move a model to this rank's device, in place: trained parameters in fp32, others in `compute`."""
    _convert(model, compute)
    model.to(device())


def _convert(module: nn.Module, compute: torch.dtype) -> None:
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):  # of a block that is sharded already
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)


def shard(model: nn.Module, blocks: Iterable[nn.Module], compute: torch.dtype) -> None:
    """Shard a model over the ranks with FSDP2, in place; dtypes as in to_device, arithmetic in `compute`.

    blocks: the model's layers, a group each. A group is converted, moved and sharded before the next one, so
    that a checkpoint mapped from its files takes the memory of one group.
    """
    _, size = init()
    if not dist.is_initialized():
        _connect(dist.HashStore(), 0, 1)  # FSDP2 needs a process group, also for a world of one
    mesh = init_device_mesh(torch.device(device()).type, (size,))
    # Leave inputs as they are: the vision tower's rotary tables are fp32 in the plain module, too.
    precision = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*blocks, model]:
        _convert(module, compute)
        # By default the root stays gathered after its forward, and would be stale after the optimiser's step.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    register_fsdp_forward_method(model, "run")  # what Policy.run calls gathers the root, as a forward does


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather a sharded model once for a block of code, in which ranks may sample answers of any length."""
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
    """Set whether the next backward passes exchange gradients among ranks, or add them up on each rank."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)


def rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor, as a view of at least one dimension, and the number of the first. FSDP2
    gives each rank an equal number of rows, and the last ones fewer; what is not sharded is whole."""
    if not isinstance(tensor, DTensor):
        return torch.atleast_1d(tensor), 0
    rank, size = init()
    return tensor.to_local(), min(rank * -(-len(tensor) // size), len(tensor))


def full_state(model: nn.Module, dtype: torch.dtype, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """name -> the whole tensor in this dtype, on the CPU of rank 0; {} on other ranks. Collective."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {}
    for name, tensor in model.state_dict().items():
        if not (trained_only and name in frozen):
            tensor = tensor.detach().to(dtype)  # before it is gathered: half the memory and traffic
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state |= {name: tensor.cpu()} if init()[0] == 0 else {}
    return state
