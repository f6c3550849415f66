"""Every kind of wrong input gets an error that names the argument, what came and what was wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import features, weights
from torch import Tensor

import gssf_triton

PAIR_FUNCTIONS = ["pairwise_sim", "pairwise_terms", "paired_sim"]

Change = Callable[[dict[str, Any]], dict[str, Any]]


def good(device: str) -> dict[str, Any]:
    """A call that works: a and b (4, 24), W_diag (24,), W_blocks (3, 8, 8)."""
    return {"a": features(4, 24, device=device), "b": features(4, 24, device=device)} | weights(
        "diag+blocks", 3, 8, device=device
    )


def replace(name: str, make: Callable[[Tensor], Any]) -> Change:
    return lambda call: call | {name: make(call[name])}


#: What is wrong, what is done to a good call, the error, and what its message must hold, in any order.
MISTAKES: list[tuple[str, Change, type[Exception], list[str]]] = [
    ("a-list", replace("a", Tensor.tolist), TypeError, ["a", "Tensor", "list"]),
    ("a-numpy", replace("a", lambda x: x.cpu().numpy()), TypeError, ["a", "Tensor", "ndarray"]),
    ("a-None", replace("a", lambda x: None), TypeError, ["a", "Tensor", "NoneType"]),
    ("b-list", replace("b", Tensor.tolist), TypeError, ["b", "Tensor", "list"]),
    ("b-float", replace("b", lambda x: 1.0), TypeError, ["b", "Tensor", "float"]),
    ("W_diag-list", replace("W_diag", Tensor.tolist), TypeError, ["W_diag", "Tensor", "list"]),
    ("W_diag-number", replace("W_diag", lambda x: 1.0), TypeError, ["W_diag", "Tensor", "float"]),
    ("W_blocks-numpy", replace("W_blocks", lambda x: x.cpu().numpy()), TypeError, ["W_blocks", "Tensor", "ndarray"]),
    ("a-1d", replace("a", lambda x: x[0]), ValueError, ["a", "(24,)", "D)"]),
    ("b-1d", replace("b", lambda x: x[0]), ValueError, ["b", "(24,)", "D)"]),
    ("a-0d", replace("a", lambda x: x[0, 0]), ValueError, ["a", "()", "D)"]),
    ("a-integer", replace("a", Tensor.long), ValueError, ["a", "int64", "float32"]),
    ("a-complex", replace("a", lambda x: x.to(torch.complex64)), ValueError, ["a", "complex64", "float32"]),
    ("a-bool", replace("a", Tensor.bool), ValueError, ["a", "bool", "float32"]),
    ("a-float8", replace("a", lambda x: x.to(torch.float8_e4m3fn)), ValueError, ["a", "float8_e4m3fn", "float32"]),
    ("b-integer", replace("b", Tensor.int), ValueError, ["b", "int32", "float32"]),
    ("b-complex", replace("b", lambda x: x.to(torch.complex64)), ValueError, ["b", "complex64", "float32"]),
    ("b-bool", replace("b", Tensor.bool), ValueError, ["b", "bool", "float32"]),
    ("two-dtypes", replace("b", Tensor.half), ValueError, ["a", "b", "float32", "float16"]),
    ("two-D", replace("b", lambda x: x[:, :16]), ValueError, ["a", "b", "(4, 24)", "(4, 16)"]),
    (
        "batches",
        lambda call: call | {"a": call["a"].expand(2, 4, 24), "b": call["b"].expand(3, 4, 24)},
        ValueError,
        ["a", "b", "(2, 4, 24)", "(3, 4, 24)"],
    ),
    ("W_diag-short", replace("W_diag", lambda w: w[:8]), ValueError, ["W_diag", "(8,)", "(24,)"]),
    ("W_diag-2d", replace("W_diag", lambda w: w[None]), ValueError, ["W_diag", "(1, 24)"]),
    ("W_diag-integer", replace("W_diag", Tensor.int), ValueError, ["W_diag", "int32", "float32"]),
    ("W_blocks-2d", replace("W_blocks", lambda w: w[0]), ValueError, ["W_blocks", "(8, 8)", "(G, B, B)"]),
    ("W_blocks-4d", replace("W_blocks", lambda w: w[None]), ValueError, ["W_blocks", "(1, 3, 8, 8)", "(G, B, B)"]),
    (
        "W_blocks-not-square",
        replace("W_blocks", lambda w: w[:, :, :4]),
        ValueError,
        ["W_blocks", "(3, 8, 4)", "(G, B, B)"],
    ),
    ("W_blocks-too-few", replace("W_blocks", lambda w: w[:2]), ValueError, ["W_blocks", "(2, 8, 8)", "16", "24"]),
    ("W_blocks-integer", replace("W_blocks", Tensor.long), ValueError, ["W_blocks", "int64", "float32"]),
    ("b-elsewhere", replace("b", lambda x: x.to("meta")), ValueError, ["a", "b", "meta", "DEVICE"]),
    ("W_diag-elsewhere", replace("W_diag", lambda w: w.to("meta")), ValueError, ["W_diag", "meta", "DEVICE"]),
    ("W_blocks-elsewhere", replace("W_blocks", lambda w: w.to("meta")), ValueError, ["W_blocks", "meta", "DEVICE"]),
    (
        "backend",
        lambda call: call | {"backend": "cuda"},
        ValueError,
        ["backend", "'cuda'", "'auto'", "'triton'", "'torch'"],
    ),
    ("out_dtype-integer", lambda call: call | {"out_dtype": torch.int32}, ValueError, ["out_dtype", "int32"]),
    ("out_dtype-str", lambda call: call | {"out_dtype": "float32"}, TypeError, ["out_dtype", "str"]),
]


def assert_says(message: str, wanted: list[str], device: str) -> None:
    for fragment in wanted:
        fragment = device if fragment == "DEVICE" else fragment
        whole_word = rf"(?<!\w){re.escape(fragment)}(?!\w)" if fragment.isidentifier() else re.escape(fragment)
        assert re.search(whole_word, message), f"{fragment!r} is missing in: {message}"


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize(("change", "error", "wanted"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_pair_functions(
    function: str, change: Change, error: type[Exception], wanted: list[str], backend: str, device: str
) -> None:
    call = change({**good(device), "backend": backend})
    with pytest.raises(error) as raised:
        getattr(gssf_triton, function)(**call)
    assert_says(str(raised.value), wanted, device)


TRANSFORM_MISTAKES = [m for m in MISTAKES if m[0].startswith(("W_", "backend"))] + [
    ("x-list", replace("x", Tensor.tolist), TypeError, ["x", "Tensor", "list"]),
    ("x-0d", replace("x", lambda x: x[0, 0]), ValueError, ["x", "()", "D)"]),
    ("x-integer", replace("x", Tensor.long), ValueError, ["x", "int64", "float32"]),
    ("x-complex", replace("x", lambda x: x.to(torch.complex64)), ValueError, ["x", "complex64", "float32"]),
    ("side", lambda call: call | {"side": "left"}, ValueError, ["side", "'left'", "'a'", "'b'"]),
]


@pytest.mark.parametrize(
    ("change", "error", "wanted"), [m[1:] for m in TRANSFORM_MISTAKES], ids=[m[0] for m in TRANSFORM_MISTAKES]
)
def test_transform(change: Change, error: type[Exception], wanted: list[str], backend: str, device: str) -> None:
    call = good(device)
    call = change({"x": call["a"], "W_diag": call["W_diag"], "W_blocks": call["W_blocks"], "backend": backend})
    with pytest.raises(error) as raised:
        gssf_triton.transform(**call)
    assert_says(str(raised.value), wanted, device)


@pytest.mark.parametrize("function", ["pairwise_sim", "paired_sim", "transform", "dense_metric"])
def test_no_weight(function: str, device: str) -> None:
    x = features(4, 24, device=device)
    tensors = {"transform": (x,), "dense_metric": ()}.get(function, (x, x))
    with pytest.raises(ValueError, match=r"(?s)(?=.*W_diag)(?=.*W_blocks)"):
        getattr(gssf_triton, function)(*tensors, None, None)


@pytest.mark.parametrize("missing", ["W_diag", "W_blocks"])
def test_pairwise_terms_wants_both_weights(missing: str, device: str) -> None:
    with pytest.raises((TypeError, ValueError), match=missing):
        gssf_triton.pairwise_terms(**good(device) | {missing: None})


def test_paired_sim_wants_as_many_rows(backend: str, device: str) -> None:
    call = good(device)
    with pytest.raises(ValueError) as raised:
        gssf_triton.paired_sim(**call | {"b": call["b"][:3]}, backend=backend)
    assert_says(str(raised.value), ["a", "b", "(4, 24)", "(3, 24)"], device)
    with pytest.raises(ValueError):
        gssf_triton.paired_sim(**call | {"b": call["b"][:1]}, backend=backend)  # rows pair up, they never broadcast


DENSE_MISTAKES: list[tuple[str, Change, type[Exception], list[str]]] = [
    ("W_diag-list", replace("W_diag", Tensor.tolist), TypeError, ["W_diag", "Tensor", "list"]),
    ("W_blocks-list", replace("W_blocks", Tensor.tolist), TypeError, ["W_blocks", "Tensor", "list"]),
    ("W_diag-2d", replace("W_diag", lambda w: w[None]), ValueError, ["W_diag", "(1, 24)"]),
    ("W_blocks-2d", replace("W_blocks", lambda w: w[0]), ValueError, ["W_blocks", "(8, 8)", "(G, B, B)"]),
    ("two-D", replace("W_diag", lambda w: w[:16]), ValueError, ["W_diag", "W_blocks", "(16,)", "(3, 8, 8)"]),
    ("W_diag-integer", replace("W_diag", Tensor.int), ValueError, ["W_diag", "int32"]),
    ("two-devices", replace("W_diag", lambda w: w.to("meta")), ValueError, ["W_diag", "W_blocks", "meta", "DEVICE"]),
]


@pytest.mark.parametrize(
    ("change", "error", "wanted"), [m[1:] for m in DENSE_MISTAKES], ids=[m[0] for m in DENSE_MISTAKES]
)
def test_dense_metric(change: Change, error: type[Exception], wanted: list[str], device: str) -> None:
    with pytest.raises(error) as raised:
        gssf_triton.dense_metric(**change(weights("diag+blocks", 3, 8, device=device)))
    assert_says(str(raised.value), wanted, device)


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
def test_a_good_call_passes(function: str, backend: str, device: str) -> None:
    """What the tables change is a call that works, or their errors would mean nothing."""
    getattr(gssf_triton, function)(**good(device), backend=backend)


def test_triton_on_the_cpu_says_how_to_get_the_interpreter() -> None:
    program = (
        "import torch, gssf_triton\n"
        "a = torch.randn(4, 24)\n"
        "assert gssf_triton.pairwise_sim(a, a, torch.ones(24)).shape == (4, 4)\n"
        "for call in (gssf_triton.pairwise_sim, gssf_triton.paired_sim):\n"
        "    try: call(a, a, torch.ones(24), backend='triton')\n"
        "    except RuntimeError as error: print(error)\n"
        "try: gssf_triton.transform(a, torch.ones(24), backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert "TRITON_INTERPRET=1" in message and "cpu" in message
