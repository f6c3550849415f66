"""What a call costs the host is remembered, and changes nothing: not the launches, and not who may look at a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import tolerance
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import gssf_triton
from gssf_triton import operators

pytestmark = pytest.mark.kernels

PROGRAM = Path(__file__).parent / "support" / "warm_launches.py"


def test_remembered_launches(tmp_path: Path) -> None:
    """On the stub of a driver, with Triton's compiler: see the program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 14 and {name: fault for name, fault in found.items() if fault} == {}


def _similarity(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend="triton")


def _pairs(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.paired_sim(a, b[:3], W_diag, W_blocks, backend="triton")


def _fold(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.transform(a, W_diag, W_blocks, backend="triton") @ b.T


CALLS = (_similarity, _pairs, _fold)


def _inputs(device: str) -> list[Tensor]:
    return [torch.randn(*shape, device=device) for shape in ((3, 16), (5, 16), (16,), (2, 8, 8))]


@pytest.mark.parametrize("call", CALLS)
def test_a_plain_call_is_the_operators(
    call: Callable[..., Tensor], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, first and second gradients included, and no operator is dispatched."""
    leaves = [x.requires_grad_() for x in _inputs(device)]

    def everything() -> list[Tensor]:
        with torch.no_grad():
            found = [call(*leaves)]
        out = call(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [*found, out, *grads, *torch.autograd.grad(sum(grad.sin().sum() for grad in grads), leaves)]

    with monkeypatch.context() as patch:
        patch.setattr(operators, "PLAIN", frozenset())
        wanted = everything()
    monkeypatch.setattr(CustomOpDef, "__call__", None)
    assert all(torch.equal(one, other) for one, other in zip(everything(), wanted, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_whoever_looks_sees_an_operator(call: Callable[..., Tensor], device: str) -> None:
    inputs = _inputs(device)
    wanted = call(*inputs)

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    with Seen() as mode:
        assert torch.equal(call(*inputs), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and sizes become constants
        traced = torch.jit.trace(call, inputs)
    others = [x + 1 for x in inputs]
    graph = make_fx(call)(*inputs)
    assert "gssf" in mode.names and "gssf::" in str(traced.graph) and "gssf." in graph.code
    # A trace has the operators, not the first inputs' results.
    assert torch.equal(traced(*others), call(*others)) and torch.equal(graph(*others), call(*others))
    batch = torch.func.vmap(call, in_dims=(0, None, None, None))(torch.stack((inputs[0], others[0])), *inputs[1:])
    torch.testing.assert_close(batch, torch.stack((wanted, call(others[0], *inputs[1:]))))


@pytest.mark.parametrize("call", CALLS)
def test_imaginary_parts_of_conjugates(call: Callable[..., Tensor], device: str) -> None:
    """Tensors whose numbers lie in memory with the other sign."""
    a, *others = _inputs(device)
    turned = torch.complex(torch.zeros_like(a), a).conj().imag
    assert turned.is_neg()
    assert torch.equal(call(turned, *others), call(-a, *others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_gradient_of_unit_rows_is_one_launch(device: str, dtype: torch.dtype) -> None:
    """Rows of any length and strides; zeros, tiny and infinite rows, NaN and overflowing norms stay in their rows."""
    from gssf_triton.kernels.unit import unit_vjp

    x, grad = torch.randn(67, 45, device=device, dtype=dtype), torch.randn(45, 67, device=device, dtype=dtype).T
    x[3], x[4], x[5], x[6, 7], x[7, 8] = 0, torch.finfo(dtype).tiny, x[5] / 1e-3, torch.inf, torch.nan
    grad[9, 1], grad[10, 2] = torch.inf, torch.nan
    wide = x.detach().double().requires_grad_()
    unit = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    unit.backward(grad.double())
    found = unit_vjp(x, grad)
    assert found.dtype == dtype and wide.grad is not None
    assert torch.equal(found.isfinite().all(1), wide.grad.to(dtype).isfinite().all(1))
    rows = found.isfinite().all(1)
    wanted = wide.grad[rows]
    error = torch.linalg.vector_norm(found[rows].double() - wanted, dim=1) / torch.linalg.vector_norm(wanted, dim=1)
    assert error.max() <= tolerance(dtype)
