"""Run a function in several gloo processes on the CPU."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gssf_triton.backend import HAS_TRITON

#: Processes come from a server that has imported torch and has no threads: torch takes seconds to import, and a process
#: forked from a test's own may wait for ever for a lock that one of its threads held.
METHOD = "forkserver"
mp.get_context(METHOD).set_forkserver_preload(
    ["torch.distributed.fsdp", "torch._dynamo", "hypothesis", "pytest", "gssf_triton.nn"]
    + ["gssf_triton.kernels.stream"] * HAS_TRITON
)

#: Longer than any test's computation; a collective that waits longer has been left alone.
TIMEOUT = timedelta(seconds=60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(rank: int, world: int, port: int, timeout: timedelta = TIMEOUT) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)


def _process(rank: int, world: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    join(rank, world, port)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def in_processes(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `world` processes; a failed assertion in one of them fails here."""
    mp.start_processes(  # type: ignore[no-untyped-call]
        _process, (world, free_port(), work, *arguments), nprocs=world, start_method=METHOD
    )


def _survivor(
    rank: int, world: int, port: int, timeout: timedelta, pipe: Connection, work: Callable[..., None], arguments: Any
) -> None:
    join(rank, world, port, timeout)
    try:
        work(rank, *arguments)
        pipe.send("ended well")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    # No farewell to the others: some of them may be gone.
    os._exit(0)


def endings(world: int, timeout: timedelta, within: float, work: Callable[..., None], *arguments: Any) -> list[str]:
    """How each process ended: "ended well", its error, "died", or "hangs" where it has not ended `within` seconds."""
    context, port = mp.get_context(METHOD), free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_survivor, args=(rank, world, port, timeout, theirs, work, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = []
    deadline = time.monotonic() + within
    for pipe in pipes:
        try:
            found.append(pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else "hangs")
        except EOFError:
            found.append("died")
    for process in processes:
        process.kill()
        process.join()
    return found
