"""The definition of GSSF in float64, and how far from it a result may lie.

Every function here has the name and the arguments of the one in `gssf_triton` that it judges. It is the sum over
channels as the paper writes it: no fold, no tile, no hand-written gradient, nothing shared with the code under test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gssf_triton

# ---------------------------------------------------------------- the definition


def pairwise_terms(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, *, normalize: bool = False
) -> tuple[Tensor, ...]:
    """The terms of S that have a weight, each (..., M, N)."""
    if normalize:
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    terms = []
    if W_diag is not None:
        terms.append(torch.einsum("...im,m,...jm->...ij", a, W_diag, b))
    if W_blocks is not None:
        G, B, _ = W_blocks.shape
        a, b = (x.unflatten(-1, (G, B)) for x in (a, b))
        terms.append(torch.einsum("...igp,gpq,...jgq->...ij", a, W_blocks, b))
    return tuple(terms)


def pairwise_sim(
    a: Tensor, b: Tensor, W_diag: Tensor | None = None, W_blocks: Tensor | None = None, *, normalize: bool = False
) -> Tensor:
    """S[i, j] = Σ_m a[i, m] W_diag[m] b[j, m] + Σ_gpq a[i, gB+p] W_blocks[g, p, q] b[j, gB+q]."""
    return sum(pairwise_terms(a, b, W_diag, W_blocks, normalize=normalize), start=a.new_zeros(()))


def paired_sim(
    a: Tensor, b: Tensor, W_diag: Tensor | None = None, W_blocks: Tensor | None = None, *, normalize: bool = False
) -> Tensor:
    """S[i, i] alone: each row a matrix of one row."""
    one_row = (x.unsqueeze(-2) for x in (a, b))
    return pairwise_sim(*one_row, W_diag, W_blocks, normalize=normalize)[..., 0, 0]


def dense_metric(W_diag: Tensor | None = None, W_blocks: Tensor | None = None) -> Tensor:
    """W ⊙ U, entry by entry: (m, n) is in the topology where m = n, and where m // B = n // B."""
    given = W_blocks if W_blocks is not None else W_diag
    assert given is not None
    D = given.shape[0] * (given.shape[1] if given.dim() == 3 else 1)
    m, n = torch.meshgrid(torch.arange(D), torch.arange(D), indexing="ij")
    dense = torch.zeros(D, D, dtype=torch.float64, device=given.device)
    if W_diag is not None:
        dense = dense + (m == n).to(dense) * W_diag[m]
    if W_blocks is not None:
        B = W_blocks.shape[-1]
        dense = dense + (m // B == n // B).to(dense) * W_blocks[m // B, m % B, n % B]
    return dense


def transform(
    x: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    side: str = "a",
    normalize: bool = False,
) -> Tensor:
    """x (W ⊙ U) for side "a", x (W ⊙ U)ᵀ for side "b"."""
    if normalize:
        x = torch.nn.functional.normalize(x, dim=-1)
    return torch.einsum("...m,mn->...n" if side == "a" else "...n,mn->...m", x, dense_metric(W_diag, W_blocks))


# ---------------------------------------------------------------- how far off a result may be

#: Relative Frobenius error of values and gradients against float64, by dtype. The only tolerances in the suite.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
#: float32 where torch.get_float32_matmul_precision() is not "highest" and products may run in TF32.
TF32_TOLERANCE = 1e-3
#: A single coordinate may be off by this many tolerances of its own size and the typical one.
WORST_COORDINATE = 10.0


def tolerance(*dtypes: torch.dtype) -> float:
    """The table's entry for the coarsest of the dtypes that a result passed through."""
    table = dict(TOLERANCE)
    if torch.get_float32_matmul_precision() != "highest":
        table[torch.float32] = TF32_TOLERANCE
    return max(table[dtype] for dtype in dtypes)


def assert_close(
    actual: Tensor, expected: Tensor, tol: float, *, name: str = "result", size: Tensor | None = None
) -> None:
    """Bound the Frobenius error by tol and the worst coordinate by WORST_COORDINATE tol; print where it is worst.

    `size` is what each coordinate would measure if the terms of its sum had random signs. It matters where there are so
    few coordinates that all of them may cancel by chance: a relative error means nothing there.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs()
    norm = max(float(expected.norm()), 0.0 if size is None else float(size.norm()) / 2)
    typical = norm / expected.numel() ** 0.5
    relative = float(error.norm()) / norm if norm > 0 else float(error.norm())
    allowed = WORST_COORDINATE * tol * (expected.abs() + typical)
    if relative <= tol and bool((error <= allowed).all()):
        return
    worst = (error / allowed.clamp_min(1e-300)).nan_to_num(nan=float("inf")).flatten()
    lines = [f"{name} {tuple(expected.shape)}: relative Frobenius error {relative:.3g}, allowed {tol:.3g}; worst:"]
    for flat in worst.topk(min(8, worst.numel())).indices.tolist():
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape))
        lines.append(f"  {list(at)}: got {actual[at]:.9g}, expected {expected[at]:.9g}, allowed ± {allowed[at]:.3g}")
    raise AssertionError("\n".join(lines))


# ---------------------------------------------------------------- data, and the comparison every test makes


def features(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


#: Elements between two neighbours: the third one's offset leaves 32 bits.
APART = 2**30


def far_apart(count: int, near: int, device: str, directory: Path) -> Tensor:
    """(count, near) float16 numbers, rows APART elements apart; on the CPU in a sparse file, which takes no space."""
    elements = APART * (count - 1) + near
    if device == "cpu":
        base = torch.from_file(str(directory / "sparse"), shared=True, size=elements, dtype=torch.float16)
    else:
        base = torch.zeros(elements, dtype=torch.float16, device=device)
    x = base.as_strided((count, near), (APART, 1))
    x.copy_(torch.randn(count, near))
    return x


def weights(
    kind: str, G: int, B: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """The weights that `kind` names: "diag", "blocks" or "diag+blocks". Neither is symmetric nor near the identity."""
    W_diag, W_blocks = 1 + torch.randn(G * B, dtype=torch.float64), torch.randn(G, B, B, dtype=torch.float64) / B**0.5
    return {
        "W_diag": W_diag.to(device, dtype) if "diag" in kind else None,
        "W_blocks": W_blocks.to(device, dtype) if "blocks" in kind else None,
    }


Outputs = tuple[Tensor, ...]


def _run(
    function: Callable[..., Any], tensors: Mapping[str, Tensor | None], grads: Sequence[Tensor] | None, **options: Any
) -> tuple[Outputs, dict[str, Tensor]]:
    """The outputs, and the gradients of the leaves that want one, by name."""
    out = function(**tensors, **options)
    outputs: Outputs = out if isinstance(out, tuple) else (out,)
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    if not wanted or grads is None:
        return outputs, {}
    found = torch.autograd.grad(outputs, list(wanted.values()), list(grads), allow_unused=True)
    return outputs, {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def _copies(tensors: Mapping[str, Tensor | None], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor | None]:
    return {
        name: None if x is None else change(name, x.detach().double()).requires_grad_(x.requires_grad)
        for name, x in tensors.items()
    }


def check(
    function: str,
    tensors: Mapping[str, Tensor | None],
    *,
    grad_output: Callable[[Tensor], Tensor] = torch.randn_like,
    normalize: bool | None = None,
    side: str | None = None,
    **options: Any,
) -> Outputs:
    """Hold `gssf_triton.<function>(**tensors)`, and every gradient asked for, to the reference of the same name.

    The leaves with `requires_grad` are those whose gradient is compared; `grad_output` makes each output's incoming
    gradient from the output; `options` go to gssf_triton alone. Returns gssf_triton's outputs.
    """
    shared: dict[str, Any] = {
        **({} if normalize is None else {"normalize": normalize}),
        **({} if side is None else {"side": side}),
    }
    ours, exact = getattr(gssf_triton, function), getattr(sys.modules[__name__], function)
    kept = {name: None if x is None else x.detach().clone() for name, x in tensors.items()}

    out = ours(**tensors, **shared, **options)
    outputs: Outputs = out if isinstance(out, tuple) else (out,)
    incoming = [grad_output(o.detach()) for o in outputs]
    leaves = [x for x in tensors.values() if x is not None and x.requires_grad]
    assert all(o.requires_grad == bool(leaves) for o in outputs)
    if leaves:
        torch.autograd.backward(outputs, incoming)

    wide = [g.double() for g in incoming]
    expected, expected_grads = _run(exact, _copies(tensors, lambda _, x: x), wide, **shared)
    sizes, size_grads = _sizes(exact, tensors, wide, **shared)

    dtypes = {x.dtype for x in tensors.values() if x is not None} | {o.dtype for o in outputs}
    tol = tolerance(*dtypes)
    for index, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(o, e, tol, name=f"{function} output {index}", size=sizes[index])
    for name, x in tensors.items():
        if x is None:
            continue
        assert torch.equal(x.detach(), kept[name]), f"{function} changed its input {name}"  # type: ignore[arg-type]
        if not x.requires_grad:
            assert x.grad is None, f"{name} got a gradient nobody asked for"
            continue
        assert x.grad is not None and x.grad.dtype == x.dtype, f"the gradient of {name} is not in its dtype {x.dtype}"
        assert_close(x.grad, expected_grads[name], tol, name=f"{function} d{name}", size=size_grads[name])
    return outputs


def _sizes(
    exact: Callable[..., Any], tensors: Mapping[str, Tensor | None], incoming: Sequence[Tensor], **shared: Any
) -> tuple[Outputs, dict[str, Tensor]]:
    """The root of the sum of the squared terms of every output and gradient.

    GSSF is linear in each of its tensors, so the same sum over squared tensors is the sum of the squared terms.
    """
    normalize, options = shared.get("normalize"), {k: v for k, v in shared.items() if k != "normalize"}

    def squared(name: str, x: Tensor) -> Tensor:
        return (torch.nn.functional.normalize(x, dim=-1) if normalize and not name.startswith("W") else x) ** 2

    outputs, grads = _run(exact, _copies(tensors, squared), [g**2 for g in incoming], **options)
    for name, grad in grads.items():
        grads[name] = grad.sqrt()
        if normalize and not name.startswith("W"):
            x = tensors[name]
            assert x is not None
            grads[name] /= x.detach().double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return tuple(o.detach().sqrt() for o in outputs), grads


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return out
