"""Several ranks inside a test: processes forked from pytest, which need no second import of torch."""

import multiprocessing
import os
import pickle
import time
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

from runtime import distributed


def on_ranks(size, function, *arguments, timeout=300):
    """Call function(*arguments) on `size` ranks; return what each rank returned, which must be picklable.

    function enters the process group by distributed.init(), as under torchrun: this process plays torchrun's
    agent, which holds the store where the ranks meet. A rank's error is raised here with its traceback; then,
    or after `timeout` seconds, the other ranks are killed.
    """
    assert not dist.is_initialized(), "an earlier test has left a process group behind"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    fork, ranks = multiprocessing.get_context("fork"), {}
    for rank in range(size):
        receive, send = fork.Pipe(duplex=False)
        here = {**variables, "RANK": rank, "LOCAL_RANK": rank}
        ranks[receive] = process = fork.Process(target=_run, args=(send, here, function, arguments))
        process.start()
        send.close()
    results, end = {}, time.monotonic() + timeout
    try:
        while len(results) < size:
            ready = wait([receive for receive in ranks if receive not in results], end - time.monotonic())
            assert ready, f"{function.__name__} is not done after {timeout} s on some ranks"
            for receive in ready:
                try:
                    error, results[receive] = pickle.loads(receive.recv_bytes())
                except EOFError:
                    ranks[receive].join()
                    raise AssertionError(f"a rank died with code {ranks[receive].exitcode}") from None
                assert error is None, f"rank {list(ranks).index(receive)}:\n{error}"
    finally:
        for process in ranks.values():
            if len(results) < size:
                process.kill()
            process.join()
    return [results[receive] for receive in ranks]


def _run(send, environment, function, arguments):
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    try:
        result = None, function(*arguments)
        distributed.barrier()
    except BaseException:
        result = traceback.format_exc(), None
    send.send_bytes(pickle.dumps(result))
    distributed.destroy()
