"""Cases of the four losses: scales and biases, ids, reductions, near and exact ties, huge logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import losses_reference, reference
from torch import Tensor

import gssf_triton
from fuzz.draw import Draw
from fuzz.judges import Case, Outputs, Tensors
from fuzz.similarities import choose_incoming, choose_mode, choose_needs

REDUCTIONS = ("mean", "sum", "none")
#: Relative error of a similarity as the losses hold it: float32 throughout, but for half-precision features on Triton,
#: whose operands are float16.
KEPT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def _scalar(d: Draw, value: float, wide: torch.dtype) -> Tensor:
    """A learned number, in the shapes that parameters have."""
    return torch.full(d.choice(((), (1,))), value, dtype=wide, device=d.normal().device)


def _ids(d: Draw, N: int) -> Tensor | None:
    if not d.maybe(0.45, "ids"):
        return None
    return d.integers(-3, d.choice((-2, 3, max(1, N // 3), 100)), N)


def _features(d: Draw, N: int, D: int, whole: bool, scale: float, poison: float = 0.0) -> Tensor:
    """Rows of about unit norm, or of whole numbers."""
    if whole:
        return d.lay(d.whole(N, D, most=1))
    return d.rows(N, D, scale=scale / max(D, 1) ** 0.5, poison=poison)


def _sides(d: Draw, N: int, D: int, whole: bool, normalize: bool, poison: float) -> tuple[Tensor, Tensor]:
    # Features of any size where they are normalised, and logits of many thousands where they are not.
    scale = d.scale() if normalize else d.choice((1.0, 1.0, 1.0, 0.01, 30.0))
    a = _features(d, N, D, whole, scale, poison)
    if d.maybe(0.07, "a is b"):
        return a, a
    return a, _features(d, N, D, whole, scale)


def _loss(d: Draw, function: str) -> Case:
    G, B = d.channels(64 if d.small else 130)
    N = d.size(37 if d.small else 130)
    normalize = d.maybe(0.5, "normalize")
    # Whole numbers give exact ties, which go to the lowest index; the losses of one index have no others.
    whole = function == "triplet_loss" and not normalize and d.maybe(0.3, "exact ties")
    fixed: dict[str, Any] = {} if function == "distillation_loss" else {"ids": _ids(d, N)}
    # A hinge without a negative is 0 for the oracle, which never looks at such a pair's NaN.
    unseen = function == "triplet_loss" and (N == 1 or fixed["ids"] is not None)
    a, b = _sides(d, N, G * B, whole, normalize, 0.0 if unseen else 0.04)
    wide = torch.promote_types(d.dtype, torch.float32)
    tensors: Tensors = {"a": a, "b": b, **d.weights(d.kind(), G, B)}
    if whole:
        tensors |= {name: None if w is None else w.round() for name, w in tensors.items() if name.startswith("W")}
    options: dict[str, Any] = {"reduction": d.choice(REDUCTIONS)}
    d.tag(options["reduction"])
    numbers: dict[str, float] = {}
    if function != "triplet_loss":
        numbers["logit_scale"] = d.choice((1.0, 4.0, 14.3, 100.0, 0.0, -2.0, 0.01))
    if function == "sigmoid_loss":
        numbers["logit_bias"] = d.choice((-10.0, -1.5, 0.0, 3.0, 16.0))
    for name, value in numbers.items():
        if d.maybe(0.2, "plain number"):
            options[name] = value
        else:
            tensors[name] = _scalar(d, value, wide)
    if function == "info_nce":
        options["symmetric"] = d.maybe(0.7)
        options["label_smoothing"] = d.choice((0.0, 0.0, 0.1, 0.9))
        options["memory"] = d.choice(("least", "fast"))
    if function == "triplet_loss":
        options["margin"] = d.choice((0.2, 0.2, 0.0078125, 1.3, -0.1))
        options["hardest"] = d.maybe(0.5, "hardest")
    if function == "distillation_loss":
        E, given = d.choice((1, 7, 24, G * B)), d.choice(("diag", "blocks", "none", "both"))
        fixed |= {"teacher_a": _features(d, N, E, False, 1.0), "teacher_b": _features(d, N, E, False, 1.0)}
        teacher = d.weights("diag+blocks" if given == "both" else given, 1, E, dtype=wide)
        if given == "both" and E == G * B:
            d.tag("a weight used twice")
            teacher = {name: tensors[name] for name in teacher}
        fixed |= {f"teacher_{name}": w for name, w in teacher.items()}
    return _case(d, function, tensors, fixed, options, normalize, wide, N, whole)


def _case(
    d: Draw,
    function: str,
    tensors: Tensors,
    fixed: dict[str, Any],
    options: dict[str, Any],
    normalize: bool,
    wide: torch.dtype,
    N: int,
    whole: bool,
) -> Case:
    mode = choose_mode(d)
    needs = choose_needs(d, tensors)
    shape = (N,) if options["reduction"] == "none" else ()
    call, oracle = getattr(gssf_triton, function), getattr(losses_reference, function)

    def ours(given: Tensors) -> Outputs:
        return (call(**given, **fixed, **options, normalize=normalize, backend=d.asked),)

    def exact(given: Tensors) -> Outputs:
        known = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in fixed.items()}
        if function == "distillation_loss":
            known = {"teacher": {name: None if x is None else x.double() for name, x in known.items()}}
        flat = {name: x.reshape(()) if x is not None and x.numel() == 1 and name.startswith("logit") else x
                for name, x in given.items()}  # fmt: skip
        plain = {
            name: torch.tensor(x, dtype=torch.float64) if name.startswith("logit") else x for name, x in options.items()
        }
        return (oracle(**flat, **known, **plain, normalize=normalize),)

    dtype = wide if mode != "autocast" or wide == torch.float64 else torch.float32
    held = d.autocast if mode == "autocast" and wide != torch.float64 else d.dtype

    def decided(given: Tensors) -> bool:
        return function != "triplet_loss" or whole or _decided(given, fixed["ids"], options, normalize, KEPT[held])

    return Case(
        function=function, backend=d.backend, tags=d.tags, tensors=tensors, call=ours, oracle=exact,
        out_dtypes=(dtype,), needs=needs, mode=mode, autocast=d.autocast, fixed=fixed,
        incoming=choose_incoming(d, [shape], [dtype]), decided=decided, exact_ties=whole,
        repeat=d.maybe(0.1, "repeated"),
    )  # fmt: skip


def _decided(given: Tensors, ids: Tensor | None, options: dict[str, Any], normalize: bool, kept: float) -> bool:
    """Whether every hinge, and every choice of a hardest negative, is clear of the rounding of S."""
    plain = {name: None if x is None else x.detach() for name, x in given.items()}
    S = reference.pairwise_sim(**plain, normalize=normalize)  # type: ignore[arg-type]
    N = len(S)
    if N < 2:
        return True
    if not bool(S.isfinite().all()):
        # A hinge at NaN: torch's clamp passes no gradient there, its relu does.
        return False
    same = torch.eye(N, dtype=torch.bool)
    if ids is not None:
        same |= ids.cpu()[:, None] == ids.cpu()[None, :]
    # The size of S if the terms of its sums had random signs, over the whole matrix.
    near = 4 * kept * float((S.square().mean() + S.diagonal().square().mean()).sqrt())
    for hinge in (options["margin"] + S - S.diagonal()[:, None], (options["margin"] + S - S.diagonal()[None, :]).T):
        hinge = hinge.masked_fill(same, float("-inf"))
        best = hinge.sort(1, descending=True).values[:, :2]
        gap = (best[:, 0] - best[:, 1]).nan_to_num(torch.inf)[best[:, 0] > 0]
        edges = best[:, 0] if options["hardest"] else hinge
        if bool((edges.abs() < near).any()) or (options["hardest"] and bool((gap < near).any())):
            return False
    return True


def info_nce(d: Draw) -> Case:
    return _loss(d, "info_nce")


def sigmoid_loss(d: Draw) -> Case:
    return _loss(d, "sigmoid_loss")


def triplet_loss(d: Draw) -> Case:
    return _loss(d, "triplet_loss")


def distillation_loss(d: Draw) -> Case:
    return _loss(d, "distillation_loss")


FAMILY: dict[str, Callable[[Draw], Case]] = {
    "info_nce": info_nce,
    "sigmoid_loss": sigmoid_loss,
    "triplet_loss": triplet_loss,
    "distillation_loss": distillation_loss,
}
