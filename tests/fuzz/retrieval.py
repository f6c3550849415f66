"""Cases of topk, ranks and the metrics: exact ties by whole numbers, real scores by how near they are, exclusions."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import support.retrieval_reference as naive
import torch
from support.reference import TOLERANCE
from torch import Tensor

import gssf_triton
from fuzz.draw import Draw
from fuzz.judges import same_bits, strict_warnings
from gssf_triton import metrics

Gallery = Tensor | np.ndarray[Any, Any]


@dataclass
class Retrieval:
    """One call whose answer is an order: `judge` holds what came to the scores in float64."""

    function: str
    backend: str
    tags: set[str]
    tensors: dict[str, Any]
    call: Callable[[], Any]
    judge: Callable[[Any], None]
    repeat: bool = False
    kept: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Raise an AssertionError where a promise is broken."""
        with strict_warnings():
            self.kept = {
                name: x.detach().clone() if isinstance(x, Tensor) else np.array(x)
                for name, x in self.tensors.items()
                if x is not None
            }
            with torch.inference_mode("inference" in self.tags):
                found = self.call()
            for name, before in self.kept.items():
                now = self.tensors[name]
                changed = (
                    not same_bits(now, before)
                    if isinstance(now, Tensor)
                    else not np.array_equal(now, before, equal_nan=True)
                )
                assert not changed, f"{self.function} wrote to its input {name}"
            self.judge(found)
            if self.repeat:
                again = self.call()
                assert repr(again) == repr(found), f"{self.function}: the same call gave another answer"


@dataclass
class Problem:
    """Queries and a gallery, which may be one tensor, a NumPy array, or a file."""

    call: dict[str, Any]
    S: list[list[float]]
    #: How far a score may lie from S: 0 where every number is whole.
    slack: float
    items: tuple[int, int]
    whole: bool


def _rows(d: Draw, n: int, D: int, whole: bool, scale: float = 1.0) -> Tensor:
    x = d.whole(n, D) if whole else d.normal(n, D, scale=scale)
    if n and D and d.maybe(0.05, "not finite"):
        # NaN ranks first; infinities meet zeros and each other in a sum, and the order says nothing of them.
        x[d.random.randrange(n)] = math.nan
    return d.lay(x)


def _gallery_array(d: Draw, gallery: Tensor) -> Gallery:
    """The gallery as users bring theirs: a tensor, a NumPy view with negative steps or holes, a memory-mapped file."""
    if gallery.dtype == torch.bfloat16 or not d.maybe(0.2):
        return gallery
    array = gallery.detach().cpu().numpy()
    form = d.choice(("negative steps", "fortran", "file", "unaligned", "read-only"))
    d.tag(f"numpy: {form}")
    if form == "negative steps":
        return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    if form == "fortran":
        return np.asfortranarray(array)
    if form == "unaligned":
        held = np.zeros(array.nbytes + 1, np.uint8)
        off: Gallery = held[1:].view(array.dtype).reshape(array.shape)
        off[...] = array
        return off
    if form == "file" and array.size:
        folder = tempfile.mkdtemp(prefix="gssf-fuzz-")
        np.save(Path(folder) / "gallery.npy", array)
        opened: Gallery = np.load(Path(folder) / "gallery.npy", mmap_mode="r")
        (Path(folder) / "gallery.npy").unlink()
        Path(folder).rmdir()
        return opened
    array = array.copy()
    array.flags.writeable = False
    return array


def _problem(d: Draw, *, same_set: bool = False, arrays: bool = True, most: int = 0) -> Problem:
    whole = d.maybe(0.6, "exact ties")
    G, B = d.channels(24 if whole else 64)
    most = most or (70 if d.small else 130)
    Q, N = d.size(min(most, 40)), d.size(most)
    normalize = not whole and d.maybe(0.5, "normalize")
    scale = d.scale() if normalize else 1.0
    queries = _rows(d, Q, G * B, whole, scale).requires_grad_(d.maybe(0.1, "requires_grad"))
    d.maybe(0.1, "inference")
    if same_set or d.maybe(0.1, "a is b"):
        gallery, N = queries, Q
    else:
        gallery = _rows(d, N, G * B, whole, scale)
    kind = d.kind()
    weights = naive.coarse_weights(kind, G, B) if whole else d.weights(kind, G, B)
    if whole:
        weights = {
            name: None if w is None else d.lay(d.whole(*w.shape, most=1, dtype=torch.float32))
            for name, w in weights.items()
        }
    wide = [None if w is None else w.cpu() for w in weights.values()]
    known = queries.detach().cpu(), gallery.detach().cpu()
    exact = naive.scores_of(*known, *wide, normalize=normalize)
    finite = exact[exact.isfinite()]
    tol = max(TOLERANCE[x.dtype] for x in (queries, *weights.values()) if x is not None)
    slack = 0.0 if whole else 10 * tol * float(finite.square().mean().sqrt() if finite.numel() else 0.0)
    call = {
        "queries": queries,
        "gallery": _gallery_array(d, gallery) if arrays and not same_set else gallery,
        **weights,
        "normalize": normalize,
        "backend": d.asked,
    }
    return Problem(call, exact.tolist(), slack, (Q, N), whole)


def _tensors(call: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in call.items() if isinstance(x, (Tensor, np.ndarray))}


def _exclusions(d: Draw, Q: int, N: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if d.maybe(0.3, "exclude"):
        given["exclude"] = d.integers(-1, min(max(N, 1), 100), Q)
    if d.maybe(0.3, "mask"):
        given["mask"] = d.lay(d.flags(Q, N, share=d.choice((0.05, 0.6, 0.95))))
    return given


def _kept(given: dict[str, Any], Q: int, N: int, same: Callable[[int, int], bool] | None = None) -> list[list[int]]:
    lists = {name: x.tolist() for name, x in given.items()}
    return [naive.kept(i, N, lists.get("exclude"), lists.get("mask"), same) for i in range(Q)]


# ---------------------------------------------------------------- topk


def topk(d: Draw) -> Retrieval:
    p = _problem(d)
    Q, N = p.items
    k = min(N, d.choice((0, 1, 1, 2, 5, 10, 33, 64, 65, 100, N)))
    given = _exclusions(d, Q, N)
    keep = _kept(given, Q, N)

    def judge(found: tuple[Tensor, Tensor]) -> None:
        values, indices = found
        assert values.shape == indices.shape == (Q, k) and indices.dtype == torch.int64
        assert values.dtype == torch.promote_types(p.call["queries"].dtype, torch.float32)
        assert not values.requires_grad
        for i, (row, at) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            _judge_list(p, i, row, at, keep[i], k)

    return Retrieval(
        "topk", d.backend, d.tags, _tensors(p.call | given),
        lambda: gssf_triton.topk(**p.call, **given, k=k), judge, d.maybe(0.1, "repeated"),
    )  # fmt: skip


def _near(x: float, y: float, slack: float) -> bool:
    return (math.isnan(x) and math.isnan(y)) or x == y or abs(x - y) <= slack


def _judge_list(p: Problem, i: int, row: Sequence[float], at: Sequence[int], keep: Sequence[int], k: int) -> None:
    """Query i's list: whole numbers in the one right order; real ones in an order that their rounding allows."""
    count, S = min(k, len(keep)), p.S[i]
    assert list(at[count:]) == [-1] * (k - count), f"query {i}: {at} has items that may not be found"
    assert all(x == -math.inf for x in row[count:]), f"query {i}: {row} does not end in −inf"
    best = naive.order(S, keep)[:count]
    if p.whole:
        assert list(at[:count]) == best, f"query {i}: got {list(at)}, expected {best}"
    assert len(set(at[:count])) == count and set(at[:count]) <= set(keep), f"query {i}: {at} repeats, or was excluded"
    for x, j, other in zip(row, at[:count], best, strict=False):
        assert _near(x, S[j], p.slack), f"query {i}: value {x} of item {j}, expected {S[j]}"
        assert _near(S[j], S[other], 2 * p.slack), f"query {i}: item {j} of score {S[j]} stands where {S[other]} should"
    for (x, j), (y, later) in zip(zip(row, at, strict=True), list(zip(row, at, strict=True))[1:count], strict=False):
        ordered = (math.isnan(x) and (not math.isnan(y) or j < later)) or x > y or (x == y and j < later)
        assert ordered, f"query {i}: {x} at {j} stands before {y} at {later}"


# ---------------------------------------------------------------- ranks


def _labels(d: Draw, Q: int, N: int, cameras: bool) -> dict[str, Tensor]:
    classes = d.choice((1, 3, 10, 100))
    names = {"query_ids": d.integers(0, classes, Q), "gallery_ids": d.integers(-1, classes, N)}
    if cameras:
        names |= {"query_cams": d.integers(0, 3, Q), "gallery_cams": d.integers(0, 3, N)}
    return names


def ranks(d: Draw) -> Retrieval:
    p = _problem(d)
    Q, N = p.items
    names = _labels(d, Q, N, d.maybe(0.4, "cameras"))
    given = _exclusions(d, Q, N)
    lists = {name: x.tolist() for name, x in names.items()}

    def same(i: int, j: int) -> bool:
        return lists["query_ids"][i] == lists["gallery_ids"][j] and lists["query_cams"][i] == lists["gallery_cams"][j]

    keep = _kept(given, Q, N, same if "query_cams" in lists else None)

    def judge(found: Tensor) -> None:
        assert found.shape == (Q,) and found.dtype == torch.int64
        for i, rank in enumerate(found.tolist()):
            matches = [j for j in keep[i] if lists["gallery_ids"][j] == lists["query_ids"][i]]
            low, high = _allowed_ranks(p, i, keep[i], matches)
            assert low <= rank <= high, f"query {i}: rank {rank}, expected {low} to {high}"

    return Retrieval(
        "ranks", d.backend, d.tags, _tensors(p.call | given | names),
        lambda: gssf_triton.ranks(**p.call, **given, **names), judge, d.maybe(0.1, "repeated"),
    )  # fmt: skip


def _allowed_ranks(p: Problem, i: int, keep: Sequence[int], matches: Sequence[int]) -> tuple[int, int]:
    """The ranks that the first match may have where scores may be off by the slack."""
    if not matches:
        return -1, -1
    S = p.S[i]
    if p.whole:
        rank = naive.order(S, keep).index(naive.order(S, matches)[0])
        return rank, rank
    key = [math.inf if math.isnan(S[j]) else S[j] for j in range(len(S))]
    first = max(key[j] for j in matches)
    if first == math.inf:
        # NaN is NaN however it is rounded.
        rank = naive.order(S, keep).index(naive.order(S, matches)[0])
        return rank, rank
    others = [key[j] for j in keep if j not in set(matches)]
    return sum(x > first + 2 * p.slack for x in others), sum(x >= first - 2 * p.slack for x in others)


# ---------------------------------------------------------------- metrics


def _same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys(), f"{list(found)}, expected {list(expected)}"
    for name, value in expected.items():
        ours = found[name]
        near = (math.isnan(ours) and math.isnan(value)) or math.isclose(ours, value, rel_tol=1e-9, abs_tol=1e-9)
        assert near, f"{name} is {ours}, expected {value}"


def _metric_problem(d: Draw, **options: Any) -> Problem:
    """Whole numbers, or float64, whose rounding tells no two scores apart the other way round."""
    if not d.maybe(0.6):
        d.dtype = torch.float64
    while True:
        p = _problem(d, arrays=False, **options)
        # A set's cosines with itself are equal by symmetry, which rounding breaks.
        if p.whole or (d.dtype == torch.float64 and p.call["queries"] is not p.call["gallery"]):
            return p
        d.dtype = torch.float64


def _ks(d: Draw) -> tuple[int, ...]:
    return tuple(d.choice(((1, 5, 10), (1,), (3, 2, 200))))


def image_text(d: Draw) -> Retrieval:
    p = _metric_problem(d, most=40)
    I, T = p.items  # noqa: E741
    I, T = max(I, 1), max(T, 1)  # noqa: E741
    if p.items != (I, T):
        return image_text(d)
    names = {"image_ids": d.integers(0, max(I * 2 // 3, 1), I), "text_ids": d.integers(-3, max(I * 2 // 3, 1), T)}
    names["text_ids"][:1] = names["image_ids"][:1].to(names["text_ids"].dtype)
    ks = _ks(d)
    call = {name: x for name, x in p.call.items() if name not in ("queries", "gallery")}

    def judge(found: dict[str, float]) -> None:
        lists = (names["image_ids"].tolist(), names["text_ids"].tolist())
        _same(found, naive.image_text(p.S, *lists, ks))

    return Retrieval(
        "metrics.image_text", d.backend, d.tags, _tensors(p.call | names),
        lambda: metrics.image_text(p.call["queries"], p.call["gallery"], **call, **names, ks=ks), judge,
        d.maybe(0.1, "repeated"),
    )  # fmt: skip


def reid(d: Draw) -> Retrieval:
    p = _metric_problem(d)
    Q, N = p.items
    names = _labels(d, Q, N, cameras=True)
    ks = _ks(d)

    def judge(found: dict[str, float]) -> None:
        _same(found, naive.reid(p.S, *(x.tolist() for x in names.values()), ks))

    return Retrieval(
        "metrics.reid", d.backend, d.tags, _tensors(p.call | names),
        lambda: metrics.reid(**p.call, **names, ks=ks), judge, d.maybe(0.1, "repeated"),
    )  # fmt: skip


def retrieval(d: Draw) -> Retrieval:
    p = _problem(d, same_set=True)
    while not p.whole:
        p = _problem(d, same_set=True)
    N = p.items[0]
    labels = d.integers(0, d.choice((1, 3, 40)), N)
    ks = _ks(d)
    weights = {name: x for name, x in p.call.items() if name not in ("queries", "gallery")}

    def judge(found: dict[str, float]) -> None:
        _same(found, naive.retrieval(p.S, labels.tolist(), ks))

    return Retrieval(
        "metrics.retrieval", d.backend, d.tags, _tensors({**p.call, "labels": labels}),
        lambda: metrics.retrieval(p.call["queries"], labels, **weights, ks=ks), judge, d.maybe(0.1, "repeated"),
    )  # fmt: skip


FAMILY: dict[str, Callable[[Draw], Retrieval]] = {
    "topk": topk,
    "ranks": ranks,
    "metrics.image_text": image_text,
    "metrics.reid": reid,
    "metrics.retrieval": retrieval,
}
