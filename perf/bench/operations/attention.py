"""`gssf_triton.attention` beside plain scaled_dot_product_attention: what a metric in every head costs.

M queries meet N keys of D channels in each of H heads, one metric a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import gssf_triton
from bench.cells import Cell, Shape, grid, lines
from bench.operation import Contender, Inputs, Operation, Probe, metric_for, normal_for, program_of

#: Heads that the float64 truth is computed for.
PROBED = 2
FEATURES = ("q", "k", "v")
WEIGHTED = (*FEATURES, "W_diag", "W_blocks")


def make_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """One batch item; scores of about unit variance, so that no query sees one key alone."""
    s, normal = cell.shape, normal_for(cell, device, generator)
    heads = [metric_for(cell, normal) for _ in range(s["H"])]
    rows = {"q": s.M, "k": s.N, "v": s.N}
    return Inputs(
        {
            **{name: normal(1, s["H"], count, s.D, scale=1.0) for name, count in rows.items()},
            **{name: torch.stack([head[name] for head in heads]) for name in heads[0]},
        },
        upstream=normal(1, s["H"], s.M, s.D, scale=1.0),
    )


def fold_heads_in_torch(q: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """T of every head's queries as one writes it in torch."""
    groups = q.unflatten(-1, W_blocks.shape[1:3]).transpose(-3, -2)  # (1, H, G, M, B)
    return (groups @ W_blocks).transpose(-3, -2).flatten(-2) + q * W_diag[:, None]


def in_torch(q: Tensor, k: Tensor, v: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return scaled_dot_product_attention(fold_heads_in_torch(q, W_diag, W_blocks), k, v)


def probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """Some heads' results and gradients, each head by itself and all of it in float64."""
    H, plain = inputs.upstream.shape[1], mathematics.startswith("cosine")
    for h in torch.linspace(0, H - 1, min(PROBED, H)).long().tolist():
        chosen = {n: (x[:, h : h + 1] if n in FEATURES else x[h : h + 1]) for n, x in inputs.tensors.items()}
        exact = {name: x.double().requires_grad_() for name, x in chosen.items()}
        q, W_diag, W_blocks = exact["q"], exact["W_diag"], exact["W_blocks"]
        if not plain:
            q = fold_heads_in_torch(q, W_diag, W_blocks)
        weights = (q @ exact["k"].mT / q.shape[-1] ** 0.5).softmax(-1)
        out = weights @ exact["v"]
        yield Probe("out", lambda out, h=h: out[:, h : h + 1], out.detach())  # type: ignore[misc]
        if mode == "forward":
            continue
        wanted = FEATURES if plain else WEIGHTED
        upstream = inputs.upstream[:, h : h + 1].double()
        for name, truth in zip(wanted, torch.autograd.grad(out, [exact[n] for n in wanted], upstream), strict=True):
            heads = 1 if name in FEATURES else 0
            yield Probe(f"d{name}", lambda d, h=h, heads=heads: d.narrow(heads, h, 1), truth)  # type: ignore[misc]


def _cells(base: Shape, lengths: tuple[int, ...], dtype: str) -> list[Cell]:
    shapes = lines(base, MN=lengths, D=(32, 64, 128), B=(8, 16, 32, 64))
    return grid("attention", shapes, dtype, compiled=[base])


#: Lines along the sequence's length, D and B; on a GPU with a batch's worth of heads, in what attention is run in.
CELLS = {
    ("attention", "cpu"): _cells(Shape.of(512, 512, 64, 32, H=8), (64, 128, 256, 512, 1024, 2048), "fp32"),
    ("attention", "cuda"): _cells(Shape.of(2048, 2048, 64, 32, H=128), (512, 1024, 2048, 4096, 8192), "bf16"),
}
_MATHEMATICS = "gssf_attention"
ATTENTION = Operation(
    name="attention",
    cells=CELLS,
    make_inputs=make_inputs,
    contenders=(
        Contender("sdpa", "plain attention", program_of(scaled_dot_product_attention, *FEATURES), "cosine_attention"),
        Contender("gssf", "gssf_triton", program_of(gssf_triton.attention, *WEIGHTED), _MATHEMATICS, ours=True),
        Contender("torch", "torch, fold + attention", program_of(in_torch, *WEIGHTED), _MATHEMATICS),
        Contender(
            "torch_compile", "torch.compile", program_of(in_torch, *WEIGHTED, compile=True), _MATHEMATICS, compiled=True
        ),
    ),
    probes=probes,
    yardstick="torch",
    sizes={"H": 8},
    relative_to="plain attention",
    unit="scores",
    count=lambda shape: shape["H"] * shape.M * shape.N,
)
