"""topk and ranks name what is wrong with a call, what came and what was wanted, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import features, weights

import gssf_triton

Call = dict[str, Any]
Change = Callable[[Call], Call]


def good(function: str, device: str) -> Call:
    """A call that works: 4 queries, 6 items, D = 24."""
    call: Call = {"queries": features(4, 24, device=device), "gallery": features(6, 24, device=device)}
    call |= weights("diag+blocks", 3, 8, device=device)
    call |= {
        "exclude": torch.tensor([0, 5, -1, 2], device=device),
        "mask": torch.ones(4, 6, dtype=torch.bool, device=device),
    }
    if function == "topk":
        return call | {"k": 3}
    for name, count in (("query", 4), ("gallery", 6)):
        call |= {f"{name}_{kind}": torch.arange(count, device=device) for kind in ("ids", "cams")}
    return call


def put(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda call: call | {name: make(call[name])}


#: (name, change, error, pattern); DEVICE stands for the device the tensors lie on.
MISTAKES: list[tuple[str, Change, type[Exception], str]] = [
    ("queries-list", put("queries", lambda x: x.tolist()), TypeError, "queries must be a torch.Tensor, got list"),
    ("queries-numpy", put("queries", lambda x: x.cpu().numpy()), TypeError, "queries must be .* got ndarray"),
    ("queries-1d", put("queries", lambda x: x[0]), ValueError, r"queries must have .* \(24,\)"),
    (
        "queries-3d",
        put("queries", lambda x: x[None]),
        ValueError,
        r"queries must have shape \(Q, D\), got \(1, 4, 24\)",
    ),
    ("queries-int", put("queries", lambda x: x.long()), ValueError, "queries must be float16, .* got torch.int64"),
    ("gallery-list", put("gallery", lambda x: x.tolist()), TypeError, "gallery must be a torch.Tensor, got list"),
    (
        "gallery-3d",
        put("gallery", lambda x: x[None]),
        ValueError,
        r"gallery must have shape \(N, D\), got \(1, 6, 24\)",
    ),
    ("gallery-complex", put("gallery", lambda x: x.cfloat()), ValueError, "gallery must be .* got torch.complex64"),
    (
        "gallery-half",
        put("gallery", lambda x: x.half()),
        ValueError,
        "same dtype: queries is torch.float32, gallery is",
    ),
    ("gallery-D", put("gallery", lambda x: x[:, :5]), ValueError, r"same D: queries is \(4, 24\), gallery is \(6, 5\)"),
    (
        "gallery-elsewhere",
        put("gallery", lambda x: x.to("meta")),
        ValueError,
        "queries is on DEVICE, gallery is on meta",
    ),
    ("array-1d", put("gallery", lambda x: np.ones(24, np.float32)), ValueError, r"shape \(N, D\), got \(24,\)"),
    ("array-int", put("gallery", lambda x: np.ones((6, 24), int)), ValueError, "gallery is an array of int64"),
    ("array-double", put("gallery", lambda x: np.ones((6, 24))), ValueError, "gallery is an array of float64"),
    ("array-big-endian", put("gallery", lambda x: np.ones((6, 24), ">f4")), ValueError, "gallery is an array of >f4"),
    ("array-D", put("gallery", lambda x: np.ones((6, 5), np.float32)), ValueError, r"\(4, 24\), gallery is \(6, 5\)"),
    ("W_diag-short", put("W_diag", lambda w: w[:8]), ValueError, r"W_diag must have shape \(24,\), .* \(8,\)"),
    ("W_blocks-few", put("W_blocks", lambda w: w[:2]), ValueError, "W_blocks .* covers G.B = 16 channels"),
    ("no-weight", lambda call: call | {"W_diag": None, "W_blocks": None}, ValueError, "no weight given"),
    ("exclude-list", put("exclude", lambda x: x.tolist()), TypeError, "exclude must be a torch.Tensor, got list"),
    ("exclude-float", put("exclude", lambda x: x.float()), ValueError, "exclude must be integers, got torch.float32"),
    ("exclude-short", put("exclude", lambda x: x[:3]), ValueError, r"exclude must have shape \(4,\), .* got \(3,\)"),
    ("mask-numpy", put("mask", lambda x: x.cpu().numpy()), TypeError, "mask must be a torch.Tensor, got ndarray"),
    ("mask-float", put("mask", lambda x: x.float()), ValueError, "mask must be torch.bool, .* got torch.float32"),
    ("mask-shape", put("mask", lambda x: x.mT), ValueError, r"mask must have shape \(4, 6\), .* got \(6, 4\)"),
    ("mask-elsewhere", put("mask", lambda x: x.to("meta")), ValueError, "queries is on DEVICE, mask is on meta"),
    ("backend", lambda call: call | {"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
]
TOPK_MISTAKES: list[tuple[str, Change, type[Exception], str]] = [
    ("k-large", put("k", lambda k: 7), ValueError, "k must lie between 0 and the gallery's 6 items, got 7"),
    ("k-negative", put("k", lambda k: -1), ValueError, "k must lie between 0 and .* got -1"),
    ("k-float", put("k", float), TypeError, "k must be an int, got float"),
    ("k-bool", put("k", bool), TypeError, "k must be an int, got bool"),
    ("k-None", put("k", lambda k: None), TypeError, "k must be an int, got NoneType"),
]
RANKS_MISTAKES: list[tuple[str, Change, type[Exception], str]] = [
    ("ids-None", put("query_ids", lambda x: None), TypeError, "query_ids must be a torch.Tensor, got NoneType"),
    ("ids-list", put("gallery_ids", lambda x: x.tolist()), TypeError, "gallery_ids must be .* got list"),
    (
        "ids-float",
        put("gallery_ids", lambda x: x.float()),
        ValueError,
        "gallery_ids must be integers, got torch.float32",
    ),
    ("ids-short", put("query_ids", lambda x: x[1:]), ValueError, r"query_ids must have shape \(4,\), .* got \(3,\)"),
    (
        "ids-long",
        put("gallery_ids", lambda x: x.repeat(2)),
        ValueError,
        r"gallery_ids must have shape \(6,\), .* \(12,\)",
    ),
    ("ids-2d", put("gallery_ids", lambda x: x[None]), ValueError, r"gallery_ids must have shape \(6,\), .* \(1, 6\)"),
    (
        "ids-elsewhere",
        put("query_ids", lambda x: x.to("meta")),
        ValueError,
        "queries is on DEVICE, query_ids is on meta",
    ),
    (
        "cams-alone",
        put("gallery_cams", lambda x: None),
        ValueError,
        "must be given together, got None for gallery_cams",
    ),
    ("cams-short", put("query_cams", lambda x: x[1:]), ValueError, r"query_cams must have shape \(4,\), .* got \(3,\)"),
    ("cams-float", put("query_cams", lambda x: x.float()), ValueError, "query_cams must be integers"),
]
CASES = [
    (function, *mistake)
    for function, mistakes in (("topk", MISTAKES + TOPK_MISTAKES), ("ranks", MISTAKES + RANKS_MISTAKES))
    for mistake in mistakes
]


@pytest.mark.parametrize(("function", "change", "error", "pattern"), [(c[0], *c[2:]) for c in CASES],
                         ids=[f"{c[0]}-{c[1]}" for c in CASES])  # fmt: skip
def test_wrong_calls(
    function: str, change: Change, error: type[Exception], pattern: str, backend: str, device: str
) -> None:
    call = change({**good(function, device), "backend": backend})
    with pytest.raises(error, match=pattern.replace("DEVICE", device)):
        getattr(gssf_triton, function)(**call)


@pytest.mark.parametrize("function", ["topk", "ranks"])
def test_a_good_call_passes(function: str, backend: str, device: str) -> None:
    """What the tables change is a call that works, or their errors would mean nothing."""
    getattr(gssf_triton, function)(**good(function, device), backend=backend)
