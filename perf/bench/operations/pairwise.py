"""`gssf_triton.pairwise_sim` and its peers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import gssf_triton
from bench.cells import BOTH, Cell, Shape, grid, lines
from bench.operation import Build, Contender, Inputs, Operation, Probe, Program, metric_for, normal_for, program_of
from gssf_triton.kernels.choice import force_plan

#: Rows and groups that the float64 truth is computed for.
PROBED_ROWS = 64
PROBED_GROUPS = 2
#: Elements that are float64 at a time, 0.5 GB.
CHUNK = 2**26

WEIGHTED = ("a", "b", "W_diag", "W_blocks")


def make_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """Rows of about unit length, a metric around the identity."""
    s, normal = cell.shape, normal_for(cell, device, generator)
    return Inputs(
        {"a": normal(s.M, s.D, scale=s.D**-0.5), "b": normal(s.N, s.D, scale=s.D**-0.5), **metric_for(cell, normal)},
        upstream=normal(s.M, s.N),
    )


def fold_in_torch(x: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """T(x) as one writes it in torch: a batched product over the blocks, the diagonal in one multiply-add."""
    groups, size, _ = W_blocks.shape
    blocks = torch.bmm(x.view(-1, groups, size).transpose(0, 1), W_blocks)
    return torch.addcmul(blocks.transpose(0, 1).reshape(x.shape), x, W_diag)


def torch_formulation(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """S by the fold of the smaller side and one product: the best there is without kernels of one's own."""
    if a.shape[0] <= b.shape[0]:
        return fold_in_torch(a, W_diag, W_blocks) @ b.T
    return a @ fold_in_torch(b, W_diag, W_blocks.mT).T


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _dense(inputs: Inputs) -> Program:
    """a (W ⊙ U) bᵀ with all of W stored; the mask keeps W's gradient to the topology."""
    W_diag, W_blocks = inputs.tensors["W_diag"], inputs.tensors["W_blocks"]
    groups, size, _ = W_blocks.shape
    mask = torch.block_diag(*torch.ones_like(W_blocks))
    leaves = inputs.leaves("a", "b") | {"W": gssf_triton.dense_metric(W_diag, W_blocks).detach().requires_grad_()}

    def forward() -> Tensor:
        a, b, W = leaves["a"], leaves["b"], leaves["W"] * mask
        return (a @ W) @ b.T if a.shape[0] <= b.shape[0] else a @ (b @ W.T).T

    def rename(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        dW = gradients["dW"]
        blocks = dW.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return {"da": gradients["da"], "db": gradients["db"], "dW_diag": dW.diagonal(), "dW_blocks": blocks}

    return Program(forward, leaves, inputs.upstream, rename)


def _planned(plan: str) -> Build:
    """Ours by the plan named."""
    build = program_of(gssf_triton.pairwise_sim, *WEIGHTED)
    return lambda inputs: replace(build(inputs), around=partial(force_plan, plan))


def _product64(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float64, a chunk of right's rows at a time."""
    chunk = max(1, CHUNK // max(left.shape[0], right.shape[1]))
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64, device=left.device)
    for columns, rows in zip(left.split(chunk, dim=1), right.split(chunk), strict=True):
        total += columns.double() @ rows.double()
    return total


def probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """S, da and db at some rows and dW at some groups, each from all of dS, in float64."""
    a, b, dS = inputs.tensors["a"], inputs.tensors["b"], inputs.upstream
    W_diag, W_blocks = inputs.tensors["W_diag"].double(), inputs.tensors["W_blocks"].double()
    groups, size, _ = W_blocks.shape

    def fold(x: Tensor, blocks: Tensor) -> Tensor:
        x = x.double()
        if mathematics == "cosine":
            return x
        return x * W_diag + torch.einsum("mgp,gpq->mgq", x.view(-1, groups, size), blocks).reshape(x.shape)

    def some(count: int, of: int) -> Tensor:
        return torch.linspace(0, of - 1, min(count, of), device=a.device).long()

    rows, columns = some(PROBED_ROWS, a.shape[0]), some(PROBED_ROWS, b.shape[0])
    yield Probe("out", lambda S: S[rows][:, columns], fold(a[rows], W_blocks) @ b[columns].double().T)
    if mode == "forward":
        return
    yield Probe("da", lambda da: da[rows], fold(_product64(dS[rows], b), W_blocks.mT))
    # dSᵀ T(a) = T(dSᵀ a): T acts on the channels alone, so it may come after the sum over the rows.
    yield Probe("db", lambda db: db[columns], fold(_product64(dS[:, columns].T, a), W_blocks))
    if mathematics == "cosine":
        return
    for g in some(PROBED_GROUPS, groups).tolist():
        lanes = slice(g * size, (g + 1) * size)
        dW = torch.zeros(size, size, dtype=torch.float64, device=a.device)
        chunk = max(1, CHUNK // b.shape[0])
        for a_part, dS_part in zip(a.split(chunk), dS.split(chunk), strict=True):
            dW += a_part[:, lanes].double().T @ _product64(dS_part, b[:, lanes])
        yield Probe("dW_blocks", lambda d, g=g: d[g], dW)  # type: ignore[misc]
        yield Probe("dW_diag", lambda d, lanes=lanes: d[lanes], dW.diagonal())  # type: ignore[misc]


_SQUARE, _SMALL, _LARGE = Shape(1024, 1024, 1024, 32), Shape(512, 512, 512, 32), Shape(8192, 8192, 1024, 32)
#: M and N of the full suite on a GPU.
_SIDES = ((512, 512), (2048, 2048), (8192, 8192), (32768, 32768), (64, 10**6))
_grid = partial(grid, "pairwise_sim")
#: On a CPU lines through M = N, D and B, a tall gallery, and half precision where a CPU can bear it; quick takes two
#: minutes on two cores there, and on a GPU, with the corners that say most, one.
CELLS = {
    ("quick", "cpu"): _grid(
        [*lines(_SMALL, MN=(256, 512, 1024), D=(256, 1024), B=(16, 128)), Shape(64, 8192, 512, 32)],
        "fp32", compiled=[_SMALL],
    ),
    ("quick", "cuda"): _grid(
        [*lines(_LARGE, MN=(512, 2048, 8192), D=(256,), B=(128,)), Shape(64, 10**5, 1024, 32)],
        "bf16", "fp32", compiled=[_LARGE],
    ),
    ("full", "cpu"): [
        *_grid(lines(_SQUARE, MN=(256, 512, 1024, 2048, 4096), D=(128, 256, 512), B=(16, 64, 128)), "fp32"),
        *_grid([Shape(64, 50_000, 512, 32)], "fp32"),
        *_grid([Shape(256, 256, 256, 32)], "bf16"),
    ],
    ("full", "cuda"): _grid(
        [Shape(M, N, D, B) for M, N in _SIDES for D in (256, 512, 1024) for B in (16, 32, 64, 128)], "bf16", "fp32"
    ),
    ("goals", "cuda"): _grid([_LARGE], "bf16"),
    ("goals", "cpu"): _grid([Shape(40, 40, 64, 32)], "fp32", compiled=[], modes=[BOTH]),
}  # fmt: skip


def _gssf(name: str, label: str, build: Build, **how: bool) -> Contender:
    return Contender(name, label, build, "gssf", **how)


PAIRWISE = Operation(
    name="pairwise_sim",
    cells=CELLS,
    make_inputs=make_inputs,
    contenders=(
        Contender("cosine", "cosine, a @ b.T", program_of(_cosine, "a", "b"), "cosine"),
        _gssf("gssf", "gssf_triton", program_of(gssf_triton.pairwise_sim, *WEIGHTED), ours=True),
        _gssf("gssf_one_pass", "gssf_triton, one pass", _planned("one_pass"), ours=True, gpu_only=True),
        _gssf("gssf_fold_product", "gssf_triton, fold + product", _planned("fold_product"), ours=True, gpu_only=True),
        _gssf("torch", "torch, bmm + product", program_of(torch_formulation, *WEIGHTED)),
        _gssf("torch_compile", "torch.compile", program_of(torch_formulation, *WEIGHTED, compile=True), compiled=True),
        _gssf("dense", "dense masked W", _dense),
    ),
    probes=probes,
    yardstick="torch",
)
