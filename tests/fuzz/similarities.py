"""Cases of pairwise_sim, pairwise_terms, paired_sim, transform and dense_metric."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from support import reference
from torch import Tensor

import gssf_triton
from fuzz.draw import HALVES, Draw
from fuzz.judges import Case, Outputs, Tensors


def _batches(d: Draw) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Leading dimensions of a and of b that broadcast, and what they broadcast to."""
    full = d.choice([(), (), (), (2,), (3,), (2, 3), (1, 2), (4, 1)])
    if full and d.maybe(0.05, "empty"):
        full = (0, *full[1:])

    def side() -> tuple[int, ...]:
        own = tuple(1 if d.maybe(0.25) else n for n in full)
        return own[d.random.randint(0, len(own)) :] if d.maybe(0.3) else own

    a, b = side(), side()
    if a != b:
        d.tag("broadcast")
    if full:
        d.tag("batch")
    return a, b, tuple(torch.broadcast_shapes(a, b))


def choose_mode(d: Draw, differentiable: bool = True) -> str:
    mode = d.choice(("grad",) * 7 + ("no_grad", "inference", "autocast"))
    d.tag(mode)
    # float16 has no room for large and tiny features, as `SCALES` says; drawn apart, so that no case becomes another.
    if mode == "autocast" and not {"scale", "denormal"} & d.tags and random.Random(f"autocast {d.seed}").random() < 0.5:
        d.autocast = torch.float16
        d.tag("autocast to float16")
    return mode


def choose_needs(d: Draw, tensors: Tensors) -> set[str]:
    """Which tensors want a gradient: mostly all of them."""
    names = [name for name, x in tensors.items() if x is not None]
    if d.maybe(0.5):
        return set(names)
    d.tag("some gradients")
    return {name for name in names if d.maybe(0.5)}


def choose_incoming(d: Draw, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> tuple[Tensor | None, ...]:
    """A gradient for each output: any layout, or the one of a sum, a single number expanded."""
    made: list[Tensor | None] = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        if d.maybe(0.15, "expanded gradient"):
            made.append(d.normal(dtype=dtype).expand(shape))
        elif len(shapes) > 1 and d.maybe(0.15, "unused output"):
            made.append(None)
        else:
            made.append(d.lay(d.normal(*shape, dtype=dtype)))
    return tuple(made) if any(g is not None for g in made) else (d.normal(*shapes[0], dtype=dtypes[0]), *made[1:])


def _sides(
    d: Draw, batch_a: tuple[int, ...], M: int, batch_b: tuple[int, ...], N: int, D: int
) -> tuple[Tensor, Tensor]:
    """a and b; sometimes one tensor, or b a view of a, or one row expanded to all."""
    a = d.rows(*batch_a, M, D, scale=d.scale(), poison=0.05)
    if batch_a == batch_b and M == N and d.maybe(0.2, "a is b"):
        return a, a
    if batch_a == batch_b and M > 1 and N == (M + 1) // 2 and d.maybe(0.5, "b is a view of a"):
        return a, a.detach()[..., ::2, :]
    b = d.rows(*batch_b, N, D, scale=d.scale(), poison=0.05)
    if b.shape[-2] and d.maybe(0.07):
        b = d.expanded(b, b.dim() - 2)
    return a, b


def _finish(
    d: Draw,
    function: str,
    tensors: Tensors,
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    shared: dict[str, Any],
    *,
    twice: bool,
    out_dtype: torch.dtype | None = None,
    features: tuple[str, ...] = ("a", "b"),
) -> Case:
    mode = choose_mode(d)
    first = tensors[features[0]] if features else None
    dtype = first.dtype if first is not None else d.dtype
    if features and mode == "autocast" and dtype != torch.float64:
        dtype = d.autocast
    dtype = out_dtype or dtype
    needs = choose_needs(d, tensors)
    call = getattr(gssf_triton, function)
    oracle = getattr(reference, function)

    def ours(given: Tensors) -> Outputs:
        out = call(**given, **options, **shared)
        return out if isinstance(out, tuple) else (out,)

    def exact(given: Tensors) -> Outputs:
        out = oracle(**given, **shared)
        return tuple(out) if isinstance(out, tuple) else (out,)

    finite = "not finite" not in d.tags
    return Case(
        function=function, backend=d.backend, tags=d.tags, tensors=tensors, call=ours, oracle=exact,
        out_dtypes=(dtype,) * len(shapes), needs=needs, mode=mode, autocast=d.autocast,
        incoming=choose_incoming(d, shapes, [dtype] * len(shapes)),
        twice=twice and mode == "grad" and finite and d.dtype not in HALVES and d.maybe(0.12, "second derivative"),
        repeat=d.maybe(0.1, "repeated"),
    )  # fmt: skip


def _out_dtype(d: Draw) -> torch.dtype | None:
    if not d.maybe(0.15, "out_dtype"):
        return None
    # A wider one, or half of the float32 that everything is summed in; not float16 for what scales may take beyond it.
    wider = [torch.float32, torch.float64] if d.dtype != torch.float64 else [torch.float64]
    return d.choice([*wider, torch.bfloat16])


def _similarity(d: Draw, function: str) -> Case:
    most = 40 if d.small else 130
    G, B = d.channels()
    M, N = d.size(most), d.size(most)
    batch_a, batch_b, batch = _batches(d)
    if function == "paired_sim" or d.maybe(0.1):
        N = M
    elif d.maybe(0.05):
        N = (M + 1) // 2
    a, b = _sides(d, batch_a, M, batch_b, N, G * B)
    kind = "diag+blocks" if function == "pairwise_terms" else d.kind()
    tensors: Tensors = {"a": a, "b": b, **d.weights(kind, G, B, scale=d.scale() ** 0.25)}
    shared = {"normalize": d.maybe(0.5, "normalize")}
    out_dtype = _out_dtype(d)
    options: dict[str, Any] = {"backend": d.asked, "out_dtype": out_dtype}
    shape = (*batch, M) if function == "paired_sim" else (*batch, M, N)
    shapes = [shape, shape] if function == "pairwise_terms" else [shape]
    case = _finish(
        d, function, tensors, shapes, options, shared, twice=function != "pairwise_terms", out_dtype=out_dtype
    )
    if d.backend == "torch" and len(batch) == 1 and a.dim() == b.dim() == 3 and batch[0] and d.maybe(0.3):
        _vmapped(case, d, a.shape[0] == batch[0], b.shape[0] == batch[0])
    return case


def _vmapped(case: Case, d: Draw, over_a: bool, over_b: bool) -> None:
    """The same batch through torch.func.vmap: a call a matrix."""
    if case.mode == "autocast" or not (over_a or over_b) or d.backend != "torch":
        return
    d.tag("vmap")
    whole = case.call

    def one(given: Tensors) -> Outputs:
        a, b = given["a"], given["b"]
        assert a is not None and b is not None
        rest = {name: x for name, x in given.items() if name not in ("a", "b")}
        inner = torch.func.vmap(
            lambda x, y: whole({"a": x, "b": y, **rest}), in_dims=(0 if over_a else None, 0 if over_b else None)
        )
        out: Outputs = inner(a if over_a else a[0], b if over_b else b[0])
        return out

    case.call = one


def pairwise_sim(d: Draw) -> Case:
    return _similarity(d, "pairwise_sim")


def pairwise_terms(d: Draw) -> Case:
    return _similarity(d, "pairwise_terms")


def paired_sim(d: Draw) -> Case:
    return _similarity(d, "paired_sim")


def transform(d: Draw) -> Case:
    G, B = d.channels()
    rows = d.choice([(), (d.size(),), (2, d.size(40)), (2, 3, d.size(17))])
    x = d.rows(*rows, G * B, scale=d.scale())
    tensors: Tensors = {"x": x, **d.weights(d.kind(), G, B, scale=d.scale() ** 0.25)}
    shared = {"side": d.choice(("a", "b")), "normalize": d.maybe(0.4, "normalize")}
    shape = [tuple(x.shape)]
    return _finish(d, "transform", tensors, shape, {"backend": d.asked}, shared, twice=True, features=("x",))


def dense_metric(d: Draw) -> Case:
    d.backend = "torch"
    G, B = d.channels(130)
    tensors: Tensors = d.weights(d.kind(), G, B, dtype=d.dtype, scale=d.scale())
    D = G * B
    return _finish(d, "dense_metric", tensors, [(D, D)], {}, {}, twice=False, features=())


FAMILY: dict[str, Callable[[Draw], Case]] = {
    "pairwise_sim": pairwise_sim,
    "pairwise_terms": pairwise_terms,
    "paired_sim": paired_sim,
    "transform": transform,
    "dense_metric": dense_metric,
}
