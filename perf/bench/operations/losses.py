"""The losses and their peers: time, memory, and the error of the gradient, at the scale of a trained CLIP, 100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gssf_triton
from bench.cells import BOTH, DTYPES, Cell, Shape, grid
from bench.operation import Contender, Inputs, Operation, Probe, Program
from bench.operations import loss_peers as peers
from bench.operations.loss_peers import MARGIN, Loss, sides

LOGIT_SCALE, LOGIT_BIAS = 100.0, -16.0
#: Noise of a match, in its own size: it is about as near as the hardest of some thousand negatives.
NOISE = 6.0
#: What our loss and every gradient may err, against float64 at that scale.
BARS = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
#: Elements of S that the float64 truth holds at a time, 0.25 GB.
TRUTH_CHUNK = 2**25

SCALARS = {
    "info_nce": ("logit_scale",),
    "sigmoid_loss": ("logit_scale", "logit_bias"),
    "triplet_loss": (),
    "distillation_loss": ("logit_scale",),
}


def make_inputs(loss: str, cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """Pairs that match through noise, a metric around the identity, scalars in float32."""
    s, dtype = cell.shape, DTYPES[cell.dtype]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    a = normal(s.M, s.D)
    tensors = {
        "a": a.to(dtype),
        "b": (a + NOISE * normal(s.M, s.D)).to(dtype),
        "W_diag": (1 + 0.1 * normal(s.D)).to(dtype),
        "W_blocks": (0.1 * s.B**-0.5 * normal(s.D // s.B, s.B, s.B)).to(dtype),
    }
    values = {"logit_scale": LOGIT_SCALE, "logit_bias": LOGIT_BIAS}
    tensors |= {name: torch.tensor(values[name], device=device) for name in SCALARS[loss]}
    if loss == "distillation_loss":
        teacher = normal(s.M, s["E"])
        tensors |= {"teacher_a": teacher.to(dtype), "teacher_b": (teacher + NOISE * normal(s.M, s["E"])).to(dtype)}
    return Inputs(tensors, upstream=torch.ones((), device=device))


def _gssf(loss: str, inputs: Inputs) -> Program:
    leaves = inputs.leaves("a", "b", "W_diag", "W_blocks", *SCALARS[loss])
    options: dict[str, Any] = {name: x for name, x in inputs.tensors.items() if name.startswith("teacher")}
    options["normalize"] = True
    if loss == "triplet_loss":
        options["margin"] = MARGIN
    ours: Callable[..., Tensor] = getattr(gssf_triton, loss)
    return Program(lambda: ours(**leaves, **options), leaves, inputs.upstream)


# ------------------------------------------------------------------------------------------ the truth, in float64


def _part(loss: str, given: dict[str, Tensor], y: Tensor, first: int, t: Tensor) -> tuple[Tensor, ...]:
    """What the rows from `first` on say: of each of them, and of every column."""
    S = t @ y.T
    match = S.diagonal(first)
    if loss == "triplet_loss":
        S = S.diagonal_scatter(torch.full_like(match, float("-inf")), first)
        return match, S.amax(1), S.amax(0)
    z = given["logit_scale"] * S
    if loss == "info_nce":
        return given["logit_scale"] * match, z.logsumexp(1), z.logsumexp(0)
    if loss == "sigmoid_loss":
        z = z + given["logit_bias"]
        at_match = z.diagonal(first)
        return F.softplus(z).sum(1) - at_match, y.new_zeros(0), y.new_zeros(0)
    rows = slice(first, first + len(t))
    teacher = F.normalize(given["teacher_a"][rows]) @ F.normalize(given["teacher_b"]).T
    log_p = (given["logit_scale"].detach() * teacher).log_softmax(1)
    return F.kl_div(z.log_softmax(1), log_p, reduction="none", log_target=True).sum(1), y.new_zeros(0), y.new_zeros(0)


def true_loss(loss: str, given: dict[str, Tensor]) -> Tensor:
    """The loss in float64, from rows of S at a time, which the backward pass makes again."""
    t, y = sides(given)
    step = max(1, TRUTH_CHUNK // len(y))
    parts = []
    for first in range(0, len(t), step):
        parts.append(checkpoint(partial(_part, loss, given, y, first), t[first : first + step], use_reentrant=False))
    rows, of_rows, of_columns = zip(*parts, strict=True)
    match = torch.cat(rows)
    if loss in ("sigmoid_loss", "distillation_loss"):
        return match.mean()
    by_row, columns = torch.cat(of_rows), torch.stack(of_columns)
    if loss == "info_nce":
        return ((by_row + columns.logsumexp(0)) / 2 - match).mean()
    return ((MARGIN + by_row - match).clamp_min(0) + (MARGIN + columns.amax(0) - match).clamp_min(0)).sum()


def probes(loss: str, inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """The loss, and each gradient whole."""

    def whole(found: Tensor) -> Tensor:
        return found

    names = ("a", "b", "W_diag", "W_blocks", *SCALARS[loss])
    given = {name: x.double() for name, x in inputs.tensors.items()}
    given |= {name: given[name].requires_grad_() for name in names}
    with torch.set_grad_enabled(mode != "forward"):
        out = true_loss(loss, given)
    yield Probe("out", whole, out.detach())
    if mode == "forward":
        return
    for name, gradient in zip(names, torch.autograd.grad(out, [given[name] for name in names]), strict=True):
        yield Probe(f"d{name}", whole, gradient)


# ------------------------------------------------------------------------------------------------------- suites


def _square(N: int, D: int, extra: dict[str, int]) -> Shape:
    return Shape.of(N, N, D, 32, **extra)


def cpu_cells(loss: str, extra: dict[str, int]) -> list[Cell]:
    """Batches up to 4,096 pairs; of InfoNCE also bf16's error, and 32,768 pairs, whose S alone is 4 GiB."""
    if loss != "info_nce":
        return grid(loss, [_square(N, 256, extra) for N in (1024, 4096)], "fp32", compiled=[])
    compiled = [_square(N, 256, extra) for N in (1024, 4096)]
    return [
        *grid(loss, [_square(N, 256, extra) for N in (256, 1024, 2048, 4096)], "fp32", compiled=compiled),
        *grid(loss, [_square(4096, 512, extra)], "fp32", compiled=[], modes=[BOTH], once=True),
        *grid(loss, [_square(N, 512, extra) for N in (256, 1024, 4096)], "bf16", compiled=[], modes=[BOTH], once=True),
        *grid(loss, [_square(32768, 256, extra)], "fp32", modes=[BOTH], stored=False),
    ]


def gpu_cells(loss: str, extra: dict[str, int]) -> list[Cell]:
    """Batches up to 32,768 pairs, of InfoNCE without S to a million."""
    sizes = [(N, D) for N in (4096, 8192, 16384, 32768) for D in (512, 1024)]
    if loss == "sigmoid_loss":
        sizes.append((65536, 768))
    cells = grid(loss, [_square(N, D, extra) for N, D in sizes], "bf16")
    if loss == "info_nce":
        large = [_square(N, 1024, extra) for N in (131_072, 1_048_576)]
        cells += grid(loss, large, "bf16", modes=[BOTH], stored=False)
    return cells


def goals(loss: str) -> dict[tuple[str, str], list[Cell]]:
    """Beside what stores S, and a million pairs without it; on a CPU a small batch."""
    stored = {
        "info_nce": [(32_768, 512), (32_768, 1024)], "sigmoid_loss": [(65_536, 768)], "triplet_loss": [(32_768, 1024)],
    }.get(loss)  # fmt: skip
    if stored is None:
        return {}
    shapes = [_square(N, D, {}) for N, D in stored]
    cells = grid(loss, shapes, "bf16", modes=[BOTH], compiled=shapes[-1:])
    if loss == "info_nce":
        cells += grid(loss, [_square(1_048_576, 1024, {})], "bf16", modes=[BOTH], stored=False)
    small = grid(loss, [_square(40, 64, {})], "fp32", modes=[BOTH], compiled=[])
    return {("goals", "cuda"): cells, ("goals", "cpu"): small}


def _operation(
    loss: str, stored: Loss, others: tuple[Contender, ...] = (), kind: str = "loss", **sizes: int
) -> Operation:
    baseline, compiled = peers.stored_forms(stored, f"gssf_{kind}")
    ours = Contender("gssf", "gssf_triton", partial(_gssf, loss), f"gssf_{kind}", ours=True)
    return Operation(
        name=loss,
        cells={("losses", "cpu"): cpu_cells(loss, sizes), ("losses", "cuda"): gpu_cells(loss, sizes), **goals(loss)},
        make_inputs=partial(make_inputs, loss),
        contenders=(baseline, ours, compiled, *others),
        probes=partial(probes, loss),
        yardstick=baseline.name,
        axes=("MN",),
        sizes=sizes,
        bars=BARS,
        relative_to="eager torch",
        unit="pairs",
        count=lambda shape: shape.M,
    )


LOSSES = (
    _operation("info_nce", peers.info_nce, peers.INFO_NCE_PEERS),
    _operation("sigmoid_loss", peers.sigmoid_loss, peers.SIGMOID_PEERS),
    _operation("triplet_loss", peers.triplet_loss),
    _operation("distillation_loss", peers.distillation_loss, kind="distillation", E=512),
)
