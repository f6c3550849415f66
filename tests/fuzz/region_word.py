"""Cases of late_interaction and cross_attention_sim: masks of any pattern, poolings, padding that holds anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import region_word_reference
from torch import Tensor

import gssf_triton
from fuzz.draw import Draw
from fuzz.judges import Case, Outputs, Tensors
from fuzz.losses import KEPT
from fuzz.similarities import choose_incoming, choose_mode, choose_needs

POOLINGS = ("max-mean", "lse-mean", "max-sum")


def _mask(d: Draw, items: int, rows: int) -> Tensor | None:
    if not d.maybe(0.6, "mask"):
        return None
    lengths = d.maybe(0.5)
    valid = d.flags(items, rows, share=d.choice((0.3, 0.7, 0.95)))
    if lengths:
        valid = valid.sort(1, descending=True).values
    return d.lay(valid if d.maybe(0.8) else valid.to(torch.int64))


def _padding_holds_anything(d: Draw, x: Tensor, mask: Tensor | None) -> Tensor:
    """What is masked out does not take part, whatever it is."""
    if mask is None or not d.maybe(0.3, "junk in padding"):
        return x
    junk = d.choice((float("nan"), float("inf"), 1e4))
    return torch.where((mask != 0)[..., None], x, torch.full((), junk, dtype=x.dtype, device=x.device))


def _scores(d: Draw, function: str) -> Case:
    G, B = d.channels(48 if d.small else 96)
    late = function == "late_interaction"
    items = [d.size(5, empty=0.04) for _ in range(2)]
    rows = [d.size(33 if d.small else 70, empty=0.04) for _ in range(2)]
    rows[d.random.randrange(2)] = d.size(13, empty=0.0)
    normalize = d.maybe(0.5, "normalize")
    whole = late and not normalize and d.maybe(0.2, "exact ties")
    masks = {"region_mask": _mask(d, items[0], rows[0]), "word_mask": _mask(d, items[1], rows[1])}
    sides = []
    for n, k, mask in zip(items, rows, masks.values(), strict=True):
        # SCAN divides by the norms of rows and of similarities: no rows of zeros, which have none.
        x = (
            d.whole(n, k, G * B, most=1)
            if whole
            else d.rows(n, k, G * B, scale=d.scale() if normalize or not late else 1.0, poison=0.03, zeros=late)
        )
        sides.append(_padding_holds_anything(d, x, mask))
    tensors: Tensors = {"regions": sides[0], "words": sides[1], **d.weights(d.kind(), G, B)}
    if whole:
        tensors |= {name: None if w is None else w.round() for name, w in tensors.items() if name.startswith("W")}
    options: dict[str, Any] = {"normalize": normalize}
    if late:
        options["pooling"] = d.choice(POOLINGS)
        options["sharpness"] = d.choice((1.0, 6.0, 0.1, 50.0))
        d.tag(options["pooling"])
        whole = whole and options["pooling"] != "lse-mean"
    else:
        options["smooth"] = d.choice((9.0, 4.0, 20.0, 0.5))
    return _case(d, function, tensors, masks, options, items, whole)


def _case(
    d: Draw,
    function: str,
    tensors: Tensors,
    masks: dict[str, Tensor | None],
    options: dict[str, Any],
    items: list[int],
    whole: bool,
) -> Case:
    mode = choose_mode(d)
    out_dtype = d.choice((torch.float32, torch.float64)) if d.maybe(0.1, "out_dtype") else None
    dtype = d.autocast if mode == "autocast" and d.dtype != torch.float64 else d.dtype
    # Half-precision rows are exact; of others autocast rounds those that are not folded.
    held = KEPT[dtype if mode == "autocast" or dtype == torch.float64 else torch.float32]
    needs = choose_needs(d, tensors)
    if "not finite" in d.tags:
        # A row that meets nobody has a gradient of 0, and 0 · NaN is NaN in the weights' as it is in torch; the oracle
        # has no such pair.
        needs -= {"W_diag", "W_blocks"}
    call, oracle = getattr(gssf_triton, function), region_word_reference.REFERENCES[function]
    known = {name: None if x is None else x.cpu() for name, x in masks.items()}

    def ours(given: Tensors) -> Outputs:
        return (call(**given, **masks, **options, out_dtype=out_dtype, backend=d.asked),)

    def exact(given: Tensors) -> Outputs:
        return (oracle(**_without_padding(given, known), **known, **options),)

    def decided(given: Tensors) -> bool:
        if function == "cross_attention_sim":
            # One channel: a score is ±W, and its gradient 0 twice over, on the sphere of c and on that of x. What is
            # left of it is of second order where both are taken along one path, and of first order along two.
            return (given["regions"].shape[-1] if given["regions"] is not None else 0) > 1
        if options["pooling"] == "lse-mean" or whole:
            return True
        return _decided(_without_padding(given, known), known, options["normalize"], held)

    return Case(
        function=function, backend=d.backend, tags=d.tags, tensors=tensors, call=ours, oracle=exact,
        out_dtypes=(out_dtype or dtype,), needs=needs, mode=mode,
        autocast=d.autocast, fixed=masks,
        incoming=choose_incoming(d, [(items[0], items[1])], [out_dtype or dtype]), decided=decided, exact_ties=whole,
        dense_gradients=False,
        # The oracle's dense metric multiplies an infinity by 0; as −∞ alone it loses every maximum, and is not seen.
        dense_outputs="infinity" not in d.tags,
        repeat=d.maybe(0.1, "repeated"),
    )  # fmt: skip


def _without_padding(given: Tensors, masks: dict[str, Tensor | None]) -> Tensors:
    """Zeros for padding, which takes no part: 0 times what it holds would be NaN in the oracle's gradients."""
    kept = dict(given)
    for name, mask in zip(("regions", "words"), masks.values(), strict=True):
        x = given[name]
        if mask is not None and x is not None:
            kept[name] = x.masked_fill((mask == 0)[..., None], 0)
    return kept


def _decided(given: Tensors, masks: dict[str, Tensor | None], normalize: bool, kept: float) -> bool:
    """Whether every word's best region is clear of the second best by more than S is rounded by."""
    regions, words, *weights = (None if x is None else x.detach() for x in given.values())
    assert regions is not None and words is not None
    if normalize:
        regions, words = (torch.nn.functional.normalize(x, dim=-1) for x in (regions, words))
    metric = region_word_reference.dense_metric(*weights)
    S = torch.einsum("irm,mn,tln->itlr", regions, metric, words)
    if not bool(S.isfinite().all()):
        # Of similarities that are all infinite, or NaN, none is the best.
        return False
    region_mask, word_mask = masks.values()
    if region_mask is not None:
        S = S.masked_fill((region_mask == 0)[:, None, None, :], float("-inf"))
    if word_mask is not None:
        S = S.masked_fill((word_mask == 0)[None, :, :, None], float("-inf"))
    finite = S[S.isfinite()]
    if S.shape[3] < 2 or not finite.numel():
        return True
    best = S.sort(-1, descending=True).values
    gap = best[..., 0] - best[..., 1]
    return not bool((gap < 4 * kept * float(finite.square().mean().sqrt())).any())


def late_interaction(d: Draw) -> Case:
    return _scores(d, "late_interaction")


def cross_attention_sim(d: Draw) -> Case:
    return _scores(d, "cross_attention_sim")


FAMILY: dict[str, Callable[[Draw], Case]] = {
    "late_interaction": late_interaction,
    "cross_attention_sim": cross_attention_sim,
}
