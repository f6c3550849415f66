"""`gssf_triton.late_interaction` and `cross_attention_sim`, and their peers.

M images of R regions meet N captions of L words. The libraries of fused kernels know dot products only: they are
credited with cosine's arithmetic.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from _cells import PASSES, Cell, Shape, grid, unique
from _operation import Contender, Inputs, Operation, Probe, Program
from _pairwise import WEIGHTED, fold_in_torch
from _tensors import metric_for, normal_for
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

import gssf_triton

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
    """As `make_inputs`, but no rounding changes a word's best region: a gradient that moves tells nothing of its error.

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


def _program(function: Callable[..., Tensor]) -> Callable[[Inputs], Program]:
    def build(inputs: Inputs) -> Program:
        leaves = inputs.leaves(*WEIGHTED)
        return Program(lambda: function(**leaves), leaves, inputs.upstream)

    return build


def _compiled(function: Callable[..., Tensor]) -> Callable[[Inputs], Program]:
    def build(inputs: Inputs) -> Program:
        torch.compiler.reset()  # see _pairwise
        return _program(torch.compile(function, dynamic=False, fullgraph=True))(inputs)

    return build


def _ours(function: Callable[..., Tensor]) -> Callable[[Inputs], Program]:
    return _program(lambda a, b, W_diag, W_blocks: function(a, b, W_diag, W_blocks))


def _fused_dot(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Program]:
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
        if mode == "forward":
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


def _installed(*contenders: tuple[str, Contender]) -> tuple[Contender, ...]:
    return tuple(contender for module, contender in contenders if importlib.util.find_spec(module))


def late_cpu() -> list[Cell]:
    """Lines along N, D and L, and the shape that late interaction on a CPU is decided at."""
    base: dict[str, int] = {"M": 50, "N": 100, "D": 256, "B": 32, "R": 36, "L": 32}
    lines = [("N", (25, 50, 100, 200)), ("D", (64, 128, 256, 512)), ("L", (8, 16, 32, 64))]
    shapes = unique(Shape.of(**base | {axis: value}) for axis, values in lines for value in values)
    compiled = [Shape.of(**base)]
    both = grid("late_interaction", shapes, ("fp32",), compiled=compiled)
    return both + grid("late_interaction", [Shape.of(100, 500, 256, 32, R=36, L=32)], ("fp32",), compiled=[])


def late_gpu() -> list[Cell]:
    base: dict[str, int] = {"M": 1000, "N": 1000, "D": 1024, "B": 32, "R": 36, "L": 32}
    lines = [("N", (250, 500, 1000)), ("D", (128, 256, 1024)), ("L", (16, 32, 64))]
    shapes = unique(Shape.of(**base | {axis: value}) for axis, values in lines for value in values)
    # In half precision a word's best region is a matter of rounding: gradients are compared in float32.
    half = grid("late_interaction", shapes, ("bf16",), compiled=[Shape.of(**base)], modes=("forward",))
    return half + grid("late_interaction", [Shape.of(**base | {"M": 250, "N": 250})], ("fp32",), compiled=[])


DOT = "cosine_late_interaction"
LATE_INTERACTION = Operation(
    name="late_interaction",
    cells={("retrieval", "cpu"): late_cpu, ("retrieval", "cuda"): late_gpu},
    make_inputs=decided_inputs,
    contenders=(
        Contender("torch", "torch, all products", _program(stored), mathematics="gssf_late_interaction"),
        Contender(
            "gssf", "gssf_triton", _ours(gssf_triton.late_interaction), mathematics="gssf_late_interaction", ours=True
        ),
        Contender(
            "torch_compile", "torch.compile", _compiled(stored), mathematics="gssf_late_interaction", compiled=True
        ),
        *_installed(
            (
                "late_interaction_kernels",
                Contender("lik", "late-interaction-kernels", _fused_dot(_late_interaction_kernels), mathematics=DOT),
            ),
            (
                "flash_maxsim",
                Contender("flash_maxsim", "flash-maxsim", _fused_dot(_flash_maxsim), mathematics=DOT, gpu_only=True),
            ),
        ),
    ),
    probes=_probes(stored),
    yardstick="torch",
    modes=PASSES,
    axes=("N", "D", "L"),
    sizes={"R": 36, "L": 32},
    relative_to="all products",
    unit="pairs",
)


def attention_cpu() -> list[Cell]:
    """Lines along N and D."""
    shapes = [Shape.of(50, N, 256, 32, R=36, L=16) for N in (12, 25, 50, 100)]
    shapes += [Shape.of(50, 50, D, 32, R=36, L=16) for D in (64, 128, 256, 512)]
    return grid("cross_attention_sim", unique(shapes), ("fp32",), modes=("forward",))


def attention_gpu() -> list[Cell]:
    """COCO's 5,000 images and 25,000 captions are 5 of the largest here, in each of 5 runs of images."""
    shapes = [Shape.of(1000, N, 1024, 32, R=36, L=32) for N in (250, 1000, 5000)]
    shapes += [Shape.of(1000, 1000, D, 32, R=36, L=32) for D in (256, 512, 1024)]
    return grid("cross_attention_sim", unique(shapes), ("bf16",), modes=("forward",))


CROSS_ATTENTION = Operation(
    name="cross_attention_sim",
    cells={("retrieval", "cpu"): attention_cpu, ("retrieval", "cuda"): attention_gpu},
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, a loop over captions", _program(attention_loop), mathematics="gssf_cross_attention"),
        Contender(
            "gssf",
            "gssf_triton",
            _ours(lambda *tensors: gssf_triton.cross_attention_sim(*tensors, smooth=SMOOTH)),
            mathematics="gssf_cross_attention",
            ours=True,
        ),
    ),
    probes=_probes(attention_loop),
    yardstick="torch",
    modes=("forward",),
    axes=("N", "D"),
    sizes={"R": 36, "L": 32},
    relative_to="the loop",
    unit="pairs",
)
