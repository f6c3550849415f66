"""What launches reach the GPU's driver, by Triton's own way and by memory: prints JSON, check → its traceback or "".

A program of its own, since the tests' process runs Triton's interpreter. On the stub of a driver, which notes launches.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

import gssf_triton
from gssf_triton.autotune import stub
from gssf_triton.kernels import choice, fold, paired, warm
from gssf_triton.kernels.args import Tile
from gssf_triton.kernels.configs import FoldConfig
from gssf_triton.kernels.launch import launch, matrix, weights
from gssf_triton.metric import Metric

CONFIG = FoldConfig(64, 32, num_warps=4, num_stages=2)
CPU = torch.device("cpu")
TILES = Tile(64), Tile(32)


@triton.jit(do_not_specialize=["M"])
def toy_kernel(x, weights, out, M, D, TILE: tl.constexpr, FLAG: tl.constexpr):
    """Reads one number, and adds what the compiler may have compiled in."""
    value = tl.load(x.ptr + x.row).to(tl.float32) + M + D
    if weights.diag is not None:
        value += tl.load(weights.diag.ptr + weights.diag.stride)
    if FLAG:
        value += TILE.BLOCK_M
    tl.store(out, value)


def toy(
    x: Tensor,
    out: Tensor,
    M: int = 7,
    diag: Tensor | None = None,
    tile: Tile = TILES[0],
    flag: bool = False,
    **more: Any,
) -> None:
    launch(
        toy_kernel, (3, 2), CPU, CONFIG,
        **{"x": matrix(x), "weights": weights(Metric(diag)), "out": out, "M": M, "D": 5, "TILE": tile, "FLAG": flag}
        | more,
    )  # fmt: skip


remembered_toy = warm.remembered(lambda x, out, diag, M: toy(x, out, M, diag))


def _plain(value: Any) -> Any:
    """Tensors by address: what reaches the GPU."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


class Driver(stub._Driver):
    """Notes launches: (grid, stream, kernel, arguments). A kernel is known by the source that it is compiled from."""

    def __init__(self, arch: str = "sm_90") -> None:
        super().__init__(arch)
        self.seen: list[Any] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kind = source.hash()

        def start(x: int, y: int, z: int, stream: int, function: int, packed: Any, noted: Any, enter: Any, leave: Any,
                  *values: Any) -> None:  # fmt: skip
            if enter is not None:
                enter(noted)
            self.seen.append(((x, y, z), stream, kind, tuple(map(_plain, values))))

        return start


@contextmanager
def driver() -> Iterator[Driver]:
    """A GPU that nothing was launched on."""
    from triton.runtime.driver import driver as active

    with mock.patch.object(stub, "_Driver", Driver), stub.stub_driver("sm_90"), stub.stub_host("sm_90"):
        warm.forget()
        yield active.active


@contextmanager
def cold() -> Iterator[mock.Mock]:
    """Counts the launches inside that take Triton's own way."""
    with mock.patch.object(warm, "learn", wraps=warm.learn) as learn:
        yield learn


def ways(call: Callable[[], object], warmly: int = 0) -> tuple[list[Any], list[Any]]:
    """A call's launches by Triton's own way, and by memory: those of a third call, `warmly` of them cold."""
    with driver() as gpu:
        with mock.patch.object(warm, "_usable", False):
            call()
        wanted = gpu.seen.copy()
        call()
        call()
        gpu.seen.clear()
        with cold() as count:
            call()
        assert wanted and count.call_count == warmly, (len(wanted), count.call_count)
        return wanted, gpu.seen


X, OUT, DIAG = torch.zeros(8, 5), torch.zeros(4), torch.ones(5)
HALF = torch.zeros(9, 64, dtype=torch.bfloat16)


def check_a_launch_by_its_arguments() -> None:
    for call in (
        lambda: toy(X, OUT),
        lambda: toy(X, OUT, diag=DIAG),
        lambda: toy(X.T[1:], OUT, M=2**40, diag=DIAG[::2], tile=TILES[1], flag=True),
    ):
        wanted, found = ways(call)
        assert wanted == found


def check_a_launch_by_its_inputs() -> None:
    for call in (
        lambda: remembered_toy(X, OUT, None, 3),
        lambda: remembered_toy(X[1:, 1:], OUT, DIAG[1:], 2**40),
    ):
        wanted, found = ways(call)
        assert wanted == found
    elsewhere = torch.zeros(4)
    other = X.clone()
    for what, function in {
        "another tensor": lambda x, out: toy(x, elsewhere),
        "what torch writes": lambda x, out: toy(x, out.add_(1)),
        "what torch computes": lambda x, out: (toy(x, out), torch.zeros(4)),
        "a result that torch computes": lambda x, out: (toy(x, out), x.clone())[1],
        "a view": lambda x, out: (toy(x, out), x[0])[1],
        "a tensor that `empty` did not make": lambda x, out: toy(x, torch.empty_like(out)),
        "what torch writes into what is made": lambda x, out: toy(x, warm.empty((4,), x.dtype, CPU).mul_(2)),
        "no launch": lambda x, out: out,
    }.items():
        launcher = warm.remembered(function)
        for inference in (False, True):
            if inference and what == "what torch writes":
                continue
            with driver() as gpu, torch.inference_mode(inference):
                for _ in range(4):
                    launcher(X, OUT)
                assert list(warm._known.values()) == [warm.NEVER], (what, inference)
                assert len(gpu.seen) == (0 if what == "no launch" else 4), what
    with driver() as gpu:
        launcher = warm.remembered(lambda x, out: toy(x, out))
        for _ in range(3):
            launcher(X, X)
        assert list(warm._known.values()) == [warm.ONCE], "one tensor that is two inputs"
        for _ in range(3):
            launcher(X, other)
        assert repeated() and len(gpu.seen) == 6 and gpu.seen[-1][3][2] == other.data_ptr()


def repeated() -> list[warm.Known]:
    """What is remembered whole."""
    return [known for known in warm._known.values() if known.steps]


@warm.remembered
def made(x: Tensor, wants: bool) -> tuple[Tensor, Any]:
    """Two launches, the second of which takes what the first one makes."""
    first, second = warm.empty(x.shape, torch.float32, CPU), warm.empty((3, 2), x.dtype, CPU)
    toy(x, first)
    toy(first, second, diag=second[:, 0] if wants else None)
    return second, None


def check_a_launcher_that_makes_its_tensors() -> None:
    half = HALF[:, ::2]
    with driver() as gpu:
        for _ in range(3):
            out, nothing = made(half, False)
            assert nothing is None and out.shape == (3, 2) and out.dtype == half.dtype and out.is_contiguous()
        assert len(gpu.seen) == 6
        (x, *_), first = gpu.seen[5][3][0], gpu.seen[4][3]
        assert first[0][0] == half.data_ptr() and x == first[2] and gpu.seen[5][3][2] == out.data_ptr()
        assert [launch[2] for launch in gpu.seen[:2]] == [launch[2] for launch in gpu.seen[4:]]
        [known] = repeated()
        assert len(known.steps) == 2 and len(known.made) == 2
        for _ in range(3):
            made(half, True)  # a view of what it makes
        assert len(repeated()) == 1
        nested = warm.remembered(lambda x: (y := warm.empty((1,), x.dtype, CPU), toy(x, y), (y, (x, None, 3)))[2])
        for inference in (False, True, True, False):
            with torch.inference_mode(inference):
                out, (same, rest, number) = nested(HALF)
            assert same is HALF and rest is None and number == 3 and out.shape == (1,) and out.dtype == HALF.dtype
        assert len(repeated()) == 2


class Subclass(Tensor):
    """Not a plain tensor."""


def check_a_subclass_of_tensor() -> None:
    """It may be anything: neither memory takes it for a plain one."""
    with driver() as gpu:
        for x in (X, X, X, X.as_subclass(Subclass), X):
            remembered_toy(x, OUT, None, 3)
            toy(x, OUT)
        assert len(gpu.seen) == 10 and len(repeated()) == 1
        half = HALF.as_subclass(Subclass)
        assert type(paired.paired(half, half, Metric(), False, X.dtype)) is Tensor


def check_the_hinges_backward_pass() -> None:
    """It gathers rows by indices that no kernel has written here: NaN's bits."""
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    torch.use_deterministic_algorithms(True)
    try:
        with driver():
            gssf_triton.triplet_loss(a, b, torch.ones(64), backend="triton").backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert a.grad is not None


def check_the_hinges_launches() -> None:
    """Whose vectors are those of both sides."""
    a = torch.randn(4, 64)
    with driver():
        for _ in range(3):
            gssf_triton.triplet_loss(a, a.clone(), torch.ones(64), hardest=False, backend="triton")
        assert warm._known and warm.NEVER not in warm._known.values() and warm.ONCE not in warm._known.values()


def check_the_packages_launchers() -> None:
    metric = Metric(torch.ones(64))
    for call in (
        lambda: fold.fold(HALF, metric, True),
        lambda: paired.paired(HALF, HALF[:, :], metric, False, X.dtype),
    ):
        wanted, found = ways(call)
        # The results' addresses differ.
        assert [launch[:3] for launch in wanted] == [launch[:3] for launch in found]


def check_another_tensor_of_the_same_look() -> None:
    with driver() as gpu:
        for x in (X, X.clone(), torch.ones(8, 5)):
            remembered_toy(x, OUT, DIAG.clone(), 3)
        addresses = [launch[3][0][0] for launch in gpu.seen]
        assert addresses[0] == X.data_ptr() and len(set(addresses)) == 3 and len(warm._known) == 1


def check_what_is_compiled_for() -> None:
    """Everything that changes the kernel, one after the other, and back; by both memories."""
    odd = HALF.view(-1)[1:513].view(8, 64)
    assert odd.data_ptr() % 16 == 2 and odd.stride() == HALF[:8].stride()
    variants: list[Callable[[], None]] = [
        lambda: toy(HALF[:8], OUT),
        lambda: toy(odd, OUT),
        lambda: toy(HALF[:8].float(), OUT),
        lambda: toy(HALF[:8, ::2], OUT),
        lambda: toy(HALF[:8], OUT, M=2**31),
        lambda: toy(HALF[:8], OUT, D=16),
        lambda: toy(HALF[:8], OUT, D=1),
        lambda: toy(HALF[:8], OUT, diag=DIAG),
        lambda: toy(HALF[:8], OUT, tile=TILES[1]),
        lambda: toy(HALF[:8], OUT, flag=True),
        lambda: remembered_toy(HALF[:8], OUT, None, 2**31 - 1),
        lambda: remembered_toy(odd, OUT, None, 7),
        lambda: remembered_toy(HALF[:8], OUT, None, 2**31),
    ]
    with driver() as gpu:
        kinds = []
        for variant in variants * 3:
            gpu.seen.clear()
            variant()
            kinds.append(gpu.seen[0][2])
        once = len(variants)
        assert len(set(kinds[: once - 3])) == once - 3
        assert kinds[once - 3 : once] == [kinds[0], kinds[1], kinds[4]]
        assert kinds == kinds[:once] * 3


def check_settings_and_hooks() -> None:
    with driver() as gpu:
        toy(X, OUT)
        with mock.patch.object(knobs.runtime, "debug", True), cold() as count:
            toy(X, OUT)
        assert count.call_count == 1, "a debug kernel is another one"
        calls: list[Any] = []
        knobs.runtime.launch_enter_hook.add(calls.append)
        try:
            toy(X, OUT)
            remembered_toy(X, OUT, None, 3)
            remembered_toy(X, OUT, None, 3)
        finally:
            knobs.runtime.launch_enter_hook.remove(calls.append)
        assert len(calls) == 3 and calls[0].get()["name"] == "toy_kernel"
        run = JITFunction.run
        seen: list[Any] = []

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(self)
            return run(self, *args, **kwargs)

        with mock.patch.object(JITFunction, "run", noted):
            toy(X, OUT)
            remembered_toy(X, OUT, None, 3)
        assert len(seen) == 2 and len(gpu.seen) == 7


def check_another_device_and_choice() -> None:
    with driver() as gpu:
        remembered_toy(X, OUT, None, 3)
        gpu.number += 1  # another current device
        with cold() as count:
            remembered_toy(X, OUT, None, 3)
            toy(X, OUT, 3)
            assert count.call_count == 1
        planned: list[int] = []
        launcher = warm.remembered(lambda x, out: (planned.append(1), toy(x, out))[1])
        for change in (None, None, None, choice.forget, None, None, None):
            if change:
                change()
            launcher(X, OUT)
        assert len(planned) == 4, "the first two calls of either version"
        with choice.use(fold=CONFIG):
            launcher(X, OUT)
        assert len(planned) == 5


def check_memory_is_bounded() -> None:
    with driver(), mock.patch.object(warm, "MOST_REMEMBERED", 4):
        for n in range(2, 22):
            remembered_toy(X, OUT, None, n)
            toy(X, OUT, D=n)
            assert len(warm._known) <= 4 and len(warm._kernels) <= 4


def check_another_triton() -> None:
    """One that starts a compiled kernel otherwise: every launch takes its own way, and none is lost."""
    with driver() as gpu:
        toy(X, OUT)
        device = gpu.get_current_device()
        with mock.patch.object(warm, "driver", SimpleNamespace(active=mock.Mock(["get_current_device"]))) as other:
            other.active.get_current_device.return_value = device
            toy(X, OUT)
        assert not warm._usable and len(gpu.seen) == 2
        for _ in range(3):
            remembered_toy(X, OUT, None, 3)
        assert not warm._known and len(gpu.seen) == 5
        warm._usable = True


def check_threads() -> None:
    with driver() as gpu:
        tensors = [torch.zeros(8, 5) for _ in range(4)]

        def work(x: Tensor) -> None:
            for _ in range(200):
                remembered_toy(x, OUT, None, 3)
                toy(x, OUT)

        threads = [threading.Thread(target=work, args=(x,)) for x in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        addresses = [launch[3][0][0] for launch in gpu.seen]
        assert all(addresses.count(x.data_ptr()) == 400 for x in tensors)


def main() -> int:
    found = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
