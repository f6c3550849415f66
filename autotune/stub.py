"""A simulated GPU: a test double of what torch and Triton see of one.

Inside `stub_gpu`, tensors of the meta device or the CPU report the device `cuda:0`, and `torch.cuda` describes a
data-centre GPU of the wanted architecture. Inside `stub_driver`, Triton compiles for that GPU and launches nothing. So
the public functions run their whole Python path as on that GPU, at any size. For tests and the compile gate; use one at
a time, in one thread.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # else a dispatch mode imports it while torch.cuda's functions are replaced
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from gssf_triton import backend
from gssf_triton.autotune import lookup
from gssf_triton.kernels import devices
from gssf_triton.kernels.targets import ARCHITECTURES, KNOWN_CARDS, kin
from gssf_triton.storage import CACHE_VARIABLE

#: The device that every disguised tensor reports.
CUDA = torch.device("cuda", 0)
#: Bytes of the stub's memory: an H200's.
MEMORY_BYTES = 141 * 10**9
#: Triton keeps compiled kernels by device number: each stub gets a number that no other device has.
NUMBERS = itertools.count(1000)

#: The name of a card of each architecture. Tables find cards by name.
CARDS = {arch: names[-1] for _, arch, names in KNOWN_CARDS}


class Disguise(TorchDispatchMode):
    """Creates tensors for "cuda" on the backing device, and runs the package's operators, not their fake versions.

    `seen` is called for every operation that reaches a device: (operation, arguments, result).
    """

    def __init__(self, backing: str, seen: Callable[[Any, Any, Any], None] | None) -> None:
        super().__init__()
        self.backing = torch.device(backing)
        self.seen = seen
        #: False while torch itself computes: its Python code must see the tensors' real device.
        self.worn = True

    @contextmanager
    def _taken_off(self) -> Iterator[None]:
        before, self.worn = self.worn, False
        try:
            yield
        finally:
            self.worn = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "gssf" and (run := _implementation(func)):
            with self:
                return run(*args, **kwargs)
        if (where := kwargs.get("device")) is not None and torch.device(where).type == "cuda":
            kwargs["device"] = self.backing
        args = tuple(self.backing if isinstance(x, torch.device) and x.type == "cuda" else x for x in args)
        with self._taken_off():
            out = func(*args, **kwargs)
        if self.seen is not None:
            self.seen(func, (args, kwargs), out)
        return out


def _implementation(func: Any) -> Callable[..., Any] | None:
    """The implementation of an operator of the package; for meta tensors torch would run its fake version."""
    definition = OPDEFS.get(func._schema.name)
    return None if definition is None else definition._init_fn


@contextmanager
def _wearing(disguise: Disguise) -> Iterator[None]:
    """Tensors of the backing device report `cuda:0`."""
    real = torch._C.TensorBase.device.__get__

    def device(self: Tensor) -> torch.device:
        where: torch.device = real(self)
        return CUDA if disguise.worn and where.type == disguise.backing.type else where

    def numbered(where: Any) -> Any:
        """A device number for a bare "cuda", for which torch would ask the driver."""
        return CUDA if isinstance(where, (str, torch.device)) and str(where) == "cuda" else where

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = {name: numbered(value) for name, value in kwargs.items()}
        return torch._C.TensorBase.to(self, *map(numbered, args), **named)

    torch.Tensor.device = property(device)  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda self: self.device.type == "cuda")  # type: ignore[assignment]
    torch.Tensor.to = to  # type: ignore[assignment,method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: to(self, CUDA)  # type: ignore[method-assign]
    try:
        with disguise:
            yield
    finally:
        # The base class's attributes are visible again.
        del torch.Tensor.device, torch.Tensor.is_cuda, torch.Tensor.to, torch.Tensor.cuda


class Event:
    """A CUDA event of a device that is always idle: it records the host's time."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return max((end.at - self.at) * 1e3, 1e-3)

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        """Nothing is pending."""


class Stream:
    """A stream that is always idle."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def synchronize(self) -> None:
        """Nothing is pending."""

    wait_stream = wait_event = record_event = lambda self, other=None: other


class Guard:
    """`torch.cuda.device` and `torch.cuda.stream`, which make a device or a stream the current one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Graph:
    """A captured graph without a body: capturing runs the calls once, replaying does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def replay(self) -> None:
        """The results of the capture stay as they are."""

    reset = replay


def _answers(arch: str) -> dict[str, Any]:
    """The replaced attributes of `torch.cuda`, by name."""
    known = ARCHITECTURES[kin(arch) or "sm_90"]
    digits = arch.removeprefix("sm_")
    capability = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else (9, 4)
    properties = SimpleNamespace(
        name=CARDS.get(arch, arch), major=capability[0], minor=capability[1], total_memory=MEMORY_BYTES,
        multi_processor_count=known.processors, gcnArchName=arch, warp_size=known.warp,
        shared_memory_per_block_optin=known.shared_bytes, L2_cache_size=50 * 2**20,
    )  # fmt: skip

    def nothing(*_: Any, **__: Any) -> None: ...

    def none_used(*_: Any, **__: Any) -> int:
        return 0

    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False, "is_bf16_supported": lambda *_: True,
        "_lazy_init": nothing, "init": nothing, "synchronize": nothing, "empty_cache": nothing, "_sleep": nothing,
        "set_device": nothing, "reset_peak_memory_stats": nothing, "memory_allocated": none_used,
        "max_memory_allocated": none_used, "memory_reserved": none_used,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "current_stream": Stream, "default_stream": Stream, "Stream": Stream, "Event": Event,
        "device": Guard, "stream": Guard, "graph": Guard, "CUDAGraph": Graph,
    }  # fmt: skip


@contextmanager
def _no_tables_of_this_machine() -> Iterator[None]:
    """Ignore what was tuned on this machine: choices must not depend on it."""
    with (
        tempfile.TemporaryDirectory(prefix="gssf-stub-") as folder,
        mock.patch.dict(os.environ, {CACHE_VARIABLE: folder}),
    ):
        devices._gpu.cache_clear()
        lookup.forget()
        try:
            yield
        finally:
            devices._gpu.cache_clear()
            lookup.forget()


@contextmanager
def stub_gpu(
    arch: str = "sm_90", *, backing: str = "meta", seen: Callable[[Any, Any, Any], None] | None = None
) -> Iterator[None]:
    """Tensors on `cuda:0` of a GPU of `arch`, without one.

    Args:
        arch: "sm_80", "sm_90", "sm_100", "gfx942", …
        backing: The tensors' real device: "meta" (no data, so any size; reading a value on the host fails) or "cpu"
            (with `TRITON_INTERPRET=1` the kernels compute).
        seen: Called for every torch operation: (operation, (args, kwargs), result).
    """
    with ExitStack() as stack:
        for name, answer in _answers(arch).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.version, "hip", None if arch.startswith("sm_") else "7.0"))
        stack.enter_context(_no_tables_of_this_machine())
        stack.enter_context(_wearing(Disguise(backing, seen)))
        yield


@contextmanager
def stub_host(arch: str = "sm_90") -> Iterator[None]:
    """CPU tensors take the Triton path of `arch`. No operation is intercepted, so the host's time is real.

    Only the change of the current device at each launch is left out.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "interpreter_is_on", lambda: True))
        card = devices.Device(devices.slug(CARDS[arch]), CARDS[arch], arch)
        stack.enter_context(mock.patch.object(devices, "INTERPRETER", card))
        stack.enter_context(_no_tables_of_this_machine())
        yield


class _Driver:
    """The parts of Triton's driver that a launch uses. Launching does nothing."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        known = ARCHITECTURES[arch]
        self.number = next(NUMBERS)
        self.target = GPUTarget(known.backend, known.code, known.warp)
        properties = {
            "max_shared_mem": known.shared_bytes, "multiprocessor_count": known.processors, "warpSize": known.warp,
            "max_num_regs": 65_536,
        }  # fmt: skip
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: properties,
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def set_current_device(self, _: int) -> None: ...

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_capability(self, _: int | None = None) -> tuple[int, int]:
        return self.target.arch // 10, self.target.arch % 10

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None


@contextmanager
def stub_driver(arch: str) -> Iterator[None]:
    """Triton compiles for `arch` and launches nothing."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before
