"""`gssf_triton.late_interaction` and `cross_attention_sim`, and their peers.

M images of R regions meet N captions of L words. The libraries of fused kernels know dot products only: they are
credited with cosine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

import gssf_triton
from bench.cells import FORWARD, Cell, Shape, grid, lines
from bench.operation import (
    Build,
    Contender,
    Inputs,
    Operation,
    Probe,
    Program,
    installed,
    metric_for,
    normal_for,
    program_of,
)
from bench.operations.pairwise import WEIGHTED, fold_in_torch

#: Images and captions that the float64 truth is computed for.
PROBED = 6
#: SCAN's inverse temperature of the attention, its slope below 0 and what it adds to a norm.
SMOOTH, SLOPE, EPS = 9.0, 0.1, 1e-8


def make_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """Rows of about unit length, a metric around the identity."""
    s, normal = cell.shape, normal_for(cell, device, generator)
    tensors = {
        "a": normal(s.M, s["R"], s.D, scale=s.D**-0.5),
        "b": normal(s.N, s["L"], s.D, scale=s.D**-0.5),
        **metric_for(cell, normal),
    }
    return Inputs(tensors, upstream=normal(s.M, s.N, scale=1.0))


def decided_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """As `make_inputs`, but no rounding changes a word's best region, which would move its gradient.

    Features and weights are multiples of a quarter, so float32 adds their products exactly, in any order. In channel 0,
    which the metric leaves alone, a region adds its number times less than the products' step: no two are equal.
    """
    inputs = make_inputs(cell, device, generator)
    s, step = cell.shape, 1 / 4
    tensors = {
        name: (x * s.D**0.5 if name in "ab" else x).div(2 * step).round() * step for name, x in inputs.tensors.items()
    }
    tensors["W_diag"][0] = 1
    tensors["W_blocks"][0, 0], tensors["W_blocks"][0, :, 0] = 0, 0
    tensors["a"][..., 0] = torch.arange(s["R"], device=device) * (step**3 / 2 ** s["R"].bit_length())
    tensors["b"][..., 0] = 1
    return Inputs(tensors, inputs.upstream)


def _rows(x: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """T of every row of x (items, rows, D)."""
    return fold_in_torch(x.flatten(0, 1), W_diag, W_blocks).view(x.shape)


def _max_mean(x: Tensor, y: Tensor) -> Tensor:
    """Scores (M, N) of regions x (M, R, D) and words y (N, L, D) by way of all their products."""
    S = (x.flatten(0, 1) @ y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])
    return S.amax(1).mean(-1)


def stored(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """Late interaction as one writes it in torch."""
    return _max_mean(_rows(a, W_diag, W_blocks), b)


def attention_loop(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    """SCAN's text-to-image attention as its reference code has it: a loop over the captions, all images at a time."""
    x = normalize(a, dim=-1)
    scores = []
    for caption in b:
        y = normalize(caption, dim=-1)
        e = leaky_relu(x @ y.T, SLOPE)  # (M, R, L)
        e = e / (e.norm(dim=2, keepdim=True) + EPS)
        attended = normalize((SMOOTH * e).softmax(1).mT @ x, dim=-1)  # (M, L, D)
        scores.append((_rows(attended, W_diag, W_blocks) * y).sum(-1).mean(1))
    return torch.stack(scores, dim=1)


_cross_attention = partial(gssf_triton.cross_attention_sim, smooth=SMOOTH)


def _fused_dot(score: Callable[[Tensor, Tensor], Tensor]) -> Build:
    """A MaxSim library: score(words, regions) is (N, M), summed over the words."""

    def build(inputs: Inputs) -> Program:
        leaves = inputs.leaves("a", "b")
        words = inputs.tensors["b"].shape[1]
        return Program(lambda: (score(leaves["b"], leaves["a"]) / words).T, leaves, inputs.upstream)

    return build


def _late_interaction_kernels(words: Tensor, regions: Tensor) -> Tensor:
    import late_interaction_kernels as library

    score = library.maxsim if torch.is_grad_enabled() else library.maxsim_inference
    result: Tensor = score(words, regions)
    return result


def _flash_maxsim(words: Tensor, regions: Tensor) -> Tensor:
    import flash_maxsim as library

    score = library.flash_maxsim_batched_train if torch.is_grad_enabled() else library.flash_maxsim_batched
    result: Tensor = score(words, regions, shared_docs=True)
    return result


def _probes(reference: Callable[..., Tensor]) -> Callable[[Inputs, str, str], Iterator[Probe]]:
    """Probes of a function's scores, and of every gradient with the gradient of some scores alone in float64."""

    def probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
        exact = {name: inputs.tensors[name].double() for name in WEIGHTED}
        if mathematics.startswith("cosine"):
            exact |= {"W_diag": torch.ones_like(exact["W_diag"]), "W_blocks": torch.zeros_like(exact["W_blocks"])}
        images, captions = (
            torch.linspace(0, exact[name].shape[0] - 1, min(PROBED, exact[name].shape[0])).long() for name in "ab"
        )
        some = exact | {"a": exact["a"][images], "b": exact["b"][captions]}
        yield Probe("out", lambda out: out[images][:, captions], reference(**some))
        if mode == FORWARD:
            return
        upstream = inputs.upstream.double()
        for name, chosen, other in (("a", images, "b"), ("b", captions, "a")):
            # All of the other side, a few items at a time: an item's gradient is a sum over them.
            total = torch.zeros_like(exact[name][chosen])
            for part in torch.arange(exact[other].shape[0]).split(PROBED):
                leaf = exact[name][chosen].requires_grad_()
                scores = reference(**exact | {name: leaf, other: exact[other][part]})
                weights = upstream[chosen][:, part] if name == "a" else upstream[part][:, chosen]
                total += torch.autograd.grad(scores, leaf, weights)[0]
            yield Probe(f"d{name}", lambda d, chosen=chosen: d[chosen], total)  # type: ignore[misc]

    return probes


_SMALL, _LARGE = Shape.of(50, 100, 256, 32, R=36, L=32), Shape.of(1000, 1000, 1024, 32, R=36, L=32)
_GOALS = lines(_LARGE, D=(128, 512, 1024))
_grid = partial(grid, "late_interaction")
#: Lines along N, D and L, and on a CPU the largest call here. In half precision a word's best region is a matter of
#: rounding: gradients are compared in float32.
LATE_CELLS = {
    ("retrieval", "cpu"): [
        *_grid(
            lines(_SMALL, N=(25, 50, 100, 200), D=(64, 128, 256, 512), L=(8, 16, 32, 64)), "fp32", compiled=[_SMALL]
        ),
        *_grid([Shape.of(100, 500, 256, 32, R=36, L=32)], "fp32", compiled=[]),
    ],
    ("retrieval", "cuda"): [
        *_grid(
            lines(_LARGE, N=(250, 500, 1000), D=(128, 256, 1024), L=(16, 32, 64)), "bf16", compiled=[_LARGE],
            modes=[FORWARD],
        ),
        *_grid([Shape.of(250, 250, 1024, 32, R=36, L=32)], "fp32", compiled=[]),
    ],
    ("goals", "cuda"): _grid(_GOALS, "bf16", compiled=_GOALS[::2], modes=[FORWARD]),
    ("goals", "cpu"): _grid([Shape.of(3, 4, 64, 32, R=5, L=4)], "fp32", compiled=[], modes=[FORWARD]),
}  # fmt: skip

DOT, LATE = "cosine_late_interaction", "gssf_late_interaction"
LATE_INTERACTION = Operation(
    name="late_interaction",
    cells=LATE_CELLS,
    make_inputs=decided_inputs,
    contenders=(
        Contender("torch", "torch, all products", program_of(stored, *WEIGHTED), LATE),
        Contender("gssf", "gssf_triton", program_of(gssf_triton.late_interaction, *WEIGHTED), LATE, ours=True),
        Contender("torch_compile", "torch.compile", program_of(stored, *WEIGHTED, compile=True), LATE, compiled=True),
        *installed(
            (
                "late_interaction_kernels",
                Contender("lik", "late-interaction-kernels", _fused_dot(_late_interaction_kernels), DOT),
            ),
            ("flash_maxsim", Contender("flash_maxsim", "flash-maxsim", _fused_dot(_flash_maxsim), DOT, gpu_only=True)),
        ),
    ),
    probes=_probes(stored),
    yardstick="torch",
    axes=("N", "D", "L"),
    sizes={"R": 36, "L": 32},
    relative_to="all products",
    unit="pairs",
)


_grid = partial(grid, "cross_attention_sim", modes=[FORWARD])
#: COCO's 5,000 images and 25,000 captions are 5 of the largest here, in each of 5 runs of images.
SCAN_CELLS = {
    ("retrieval", "cpu"): _grid(
        lines(Shape.of(50, 50, 256, 32, R=36, L=16), N=(12, 25, 50, 100), D=(64, 128, 256, 512)), "fp32"
    ),
    ("retrieval", "cuda"): _grid(lines(_LARGE, N=(250, 1000, 5000), D=(256, 512, 1024)), "bf16"),
}
SCAN = "gssf_cross_attention"
CROSS_ATTENTION = Operation(
    name="cross_attention_sim",
    cells=SCAN_CELLS,
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, a loop over captions", program_of(attention_loop, *WEIGHTED), SCAN),
        Contender("gssf", "gssf_triton", program_of(_cross_attention, *WEIGHTED), SCAN, ours=True),
    ),
    probes=_probes(attention_loop),
    yardstick="torch",
    modes=(FORWARD,),
    axes=("N", "D"),
    sizes={"R": 36, "L": 32},
    relative_to="the loop",
    unit="pairs",
)
