"""lab.memory against what is allocated: every storage that is alive is counted, at every operation, while a tiny
model takes a step and samples, and while FSDP2 shards it."""

import contextlib
import dataclasses
import inspect
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from config import load_config
from lab import memory
from model import completion_logprobs
from qwen import checkpoint
from runtime import distributed
from runtime.files import ModelError

ROOT = Path(__file__).parent.parent.parent
SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"


class Alive(TorchDispatchMode):
    """Bytes of all storages that tensors hold, now and at most so far; those known by `see` from the start.
    The temporary memory inside a kernel is not seen."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, tensor):
        self._set((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())

    def _set(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, lambda: self._change(-self.sizes.pop(key)))
        size = storage.nbytes()
        self._change(size - self.sizes.get(key, 0))
        self.sizes[key] = size

    def _change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_  # by which FSDP2 frees and allocates

        def resize(storage, size):
            self.resize(storage, size)
            self._set(storage)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if DTensor in kinds:  # what becomes of it comes by again, as plain tensors
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((result,)):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result


@pytest.fixture
def ranks(monkeypatch):
    """ranks(count): this process is rank 0 of so many, whose collectives do nothing."""
    def pretend(count):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield pretend
    distributed.destroy()  # a step in bf16 makes a world of one, too
