"""Which batch sizes have Triton compile anew: prints JSON, dtype → call → [[size, new compilations], …].

The sizes that are expected to are not printed, nor those before them.

A program of its own, since launches are recorded only without Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import gssf_triton as gssf
from gssf_triton.autotune.rehearsal import Tape, recording
from gssf_triton.kernels.choice import force_plan

D, B = 64, 32
#: (sizes that may compile, sizes after them that must not). Chunks of the losses' S end raggedly, or after one row.
Sizes = tuple[tuple[int, ...], tuple[int, ...]]
BATCHES: Sizes = (256,), (255, 250, 240, 1, 300, 4097, 5000)
#: S alone: one kernel, even or ragged, whichever side has fewer rows.
FORWARD: Sizes = (256,), (240, 255, 254, 250, 1, 301, 511)
#: With gradients: an even size and a ragged one. Of S (1, 1) nobody can tell which side is the contiguous one: a kernel
#: of its own.
SQUARES: Sizes = (256, 255), (250, 240, 300, 511)
#: Rows beside 256 others: the fewer are folded, so even and ragged sizes come both above and below.
SIDES: Sizes = (240, 255, 256, 301), (250, 208, 1, 300, 511)
#: Images or captions beside 24 of the others.
ITEMS: Sizes = (16, 48), (15, 49, 10, 1, 32, 33)
#: Longer captions have wider tiles.
CAPTION_WORDS: Sizes = (32,), (31, 17, 20)


def features(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, D, dtype=dtype, device="cuda", requires_grad=True)


def weights() -> dict[str, Tensor]:
    W_diag, W_blocks = torch.empty(D, device="cuda"), torch.empty(D // B, B, B, device="cuda")
    return {"W_diag": W_diag.requires_grad_(), "W_blocks": W_blocks.requires_grad_()}


def backward(out: Tensor) -> None:
    """With a gradient that is an array of its own, as a network's is."""
    out.backward(torch.empty_like(out))


def losses(dtype: torch.dtype, with_ids: bool) -> Iterator[tuple[str, Callable[[int], None]]]:
    def pair(n: int) -> dict[str, Tensor]:
        ids = {"ids": torch.empty(n, dtype=torch.int64, device="cuda")} if with_ids else {}
        return {"a": features(n, dtype=dtype), "b": features(n, dtype=dtype), **weights(), **ids}

    def scale() -> Tensor:
        return torch.empty((), device="cuda", requires_grad=True)

    yield "info_nce", lambda n: backward(gssf.info_nce(**pair(n), logit_scale=scale()))
    yield "sigmoid_loss", lambda n: backward(gssf.sigmoid_loss(**pair(n), logit_scale=scale(), logit_bias=scale()))
    yield "triplet_loss", lambda n: backward(gssf.triplet_loss(**pair(n)))
    yield "triplet_loss, all", lambda n: backward(gssf.triplet_loss(**pair(n), hardest=False))
    if not with_ids:

        def distil(n: int) -> None:
            teacher = {f"teacher_{side}": features(n, dtype=dtype).detach() for side in "ab"}
            teacher["teacher_W_diag"] = torch.empty(D, device="cuda")
            backward(gssf.distillation_loss(**pair(n), **teacher, logit_scale=scale()))

        yield "distillation_loss", distil


def own_product(*sides: Tensor, **weights: Tensor) -> Tensor:
    """The library's product cannot change the dtype."""
    other = torch.float32 if sides[0].dtype != torch.float32 else torch.bfloat16
    with force_plan("fold_product"):
        return gssf.pairwise_sim(*sides, **weights, out_dtype=other)


def products(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[int], object], Sizes]]:
    def sides(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [features(*shape, dtype=dtype) for shape in shapes]

    def fixed(*shape: int) -> Tensor:
        return features(*shape, dtype=dtype).detach()

    fixed_weights = {name: weight.detach() for name, weight in weights().items()}
    for name, forward in (
        ("pairwise_sim", gssf.pairwise_sim),
        ("pairwise_sim, normalised", partial(gssf.pairwise_sim, normalize=True)),
        ("pairwise_terms", gssf.pairwise_terms),
        ("own product", own_product),
    ):
        # Two terms: a kernel each for even and ragged S. The product of what was folded: a fold for either side.
        sizes = FORWARD if "pairwise_sim" in name else SIDES
        for at, shapes in (
            ("n × n", lambda n: ((n,), (n,))),
            ("256 × n", lambda n: ((256,), (n,))),
            ("n × 256", lambda n: ((n,), (256,))),
            ("3 × 256 × n", lambda n: ((3, 256), (3, n))),
        ):
            yield (
                f"{name}, forward, {at}",
                lambda n, forward=forward, shapes=shapes: forward(*(fixed(*x) for x in shapes(n)), **fixed_weights),
                sizes,
            )
    for normalize in (False, True):
        kind = ", normalised" if normalize else ""
        yield (
            f"pairwise_sim, n × n{kind}",
            lambda n, normalize=normalize: backward(
                gssf.pairwise_sim(*sides((n,), (n,)), **weights(), normalize=normalize)
            ),
            SQUARES,
        )
        for at, shapes in (("256 × n", lambda n: ((256,), (n,))), ("n × 256", lambda n: ((n,), (256,)))):
            yield (
                f"pairwise_sim, {at}{kind}",
                lambda n, normalize=normalize, shapes=shapes: backward(
                    gssf.pairwise_sim(*sides(*shapes(n)), **weights(), normalize=normalize)
                ),
                SIDES,
            )
    yield (
        "pairwise_sim, 3 × n × 256",
        lambda n: backward(gssf.pairwise_sim(*sides((3, n), (3, 256)), **weights())),
        SIDES,
    )
    yield "paired_sim", lambda n: backward(gssf.paired_sim(*sides((n,), (n,)), **weights())), BATCHES
    yield "transform", lambda n: backward(gssf.transform(*sides((n,)), **weights())), BATCHES


def retrieval(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[int], object]]]:
    def rows(n: int) -> Tensor:
        return features(n, dtype=dtype).detach()

    def labels(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int64, device="cuda")

    def mask(n: int) -> Tensor:
        return torch.empty(100, n, dtype=torch.bool, device="cuda")

    yield "topk, n queries", lambda n: gssf.topk(rows(n), rows(3000), **weights(), k=10)
    yield "topk, n items", lambda n: gssf.topk(rows(100), rows(n + 9), **weights(), k=10)
    yield "topk, n items, mask", lambda n: gssf.topk(rows(100), rows(n + 16), **weights(), k=10, mask=mask(n + 16))
    yield (
        "ranks",
        lambda n: gssf.ranks(rows(n), rows(n + 9), **weights(), query_ids=labels(n), gallery_ids=labels(n + 9)),
    )


def region_words(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[int], None], Sizes]]:
    def sides(images: int, captions: int, words: int = 32) -> tuple[Tensor, Tensor]:
        return features(images, 36, dtype=dtype), features(captions, words, dtype=dtype)

    for name, call in (
        ("late_interaction", lambda *x: gssf.late_interaction(*x, **weights())),
        ("late_interaction, lse", lambda *x: gssf.late_interaction(*x, **weights(), pooling="lse-mean")),
        ("cross_attention_sim", lambda *x: gssf.cross_attention_sim(*x, **weights())),
    ):
        yield f"{name}, n images", lambda n, call=call: backward(call(*sides(n, 24))), ITEMS
        yield f"{name}, n captions", lambda n, call=call: backward(call(*sides(24, n))), ITEMS
        yield f"{name}, n words", lambda n, call=call: backward(call(*sides(24, 24, n))), CAPTION_WORDS


def new_at_each_size(tape: Tape, call: Callable[[int], object], sizes: Sizes) -> list[tuple[int, int]]:
    first, later = sizes
    known: set[tuple[str, str]] = set()
    counted = []
    for size in first + later:
        call(size)
        new = tape.cut().keys - known
        known |= new
        counted.append((size, len(new)))
    assert counted[0][1], "a call launches something"
    return counted[len(first) :]


def count(dtype: torch.dtype) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    with recording("sm_80") as tape:  # where every Triton may launch every kernel
        for with_ids in (False, True):
            for name, call in losses(dtype, with_ids):
                found[name + (", ids" if with_ids else "")] = new_at_each_size(tape, call, BATCHES)
        for name, search in retrieval(dtype):
            found[name] = new_at_each_size(tape, search, SQUARES if "mask" in name else BATCHES)
        for name, call, sizes in (*products(dtype), *region_words(dtype)):
            found[name] = new_at_each_size(tape, call, sizes)
    return found


if __name__ == "__main__":
    json.dump({name: count(getattr(torch, name)) for name in sys.argv[1:]}, sys.stdout, ensure_ascii=False)
