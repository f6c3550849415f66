"""Every argument of everything public, with every wrong kind of value: the error's type, its words, and nothing run.

`good_calls` has a call that works of each function and the kind of each of its arguments, `wrong_values` what is wrong
for each kind.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.good_calls import FUNCTIONS, MODULES, OTHERS, D, G, M, distillation_call
from support.reference import features, weights
from support.wrong_values import KINDS, assert_says, complaint, faults_of

import gssf_triton
from gssf_triton import data, metrics, nn, viz
from gssf_triton.backend import HAS_TRITON
from gssf_triton.data import Glyphs

CALLS = FUNCTIONS | MODULES | OTHERS
BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]
ARGUMENTS = [(name, parameter) for name, call in CALLS.items() for parameter in call.kinds]


@pytest.mark.parametrize(("name", "parameter"), ARGUMENTS, ids=[f"{n}-{p}" for n, p in ARGUMENTS])
def test_every_wrong_value_of_every_argument(name: str, parameter: str, device: str) -> None:
    call = CALLS[name]
    function, good = call.callable(device), call.arguments(device)
    backends = BACKENDS if "backend" in call.kinds and parameter != "backend" else [None]
    if name.startswith("nn."):
        backends = [None]
    faults = [
        fault
        for backend in backends
        for fault in faults_of(
            function, good | ({} if backend is None else {"backend": backend}), parameter, call.kinds[parameter]
        )
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_good_call_passes(name: str, backend: str, device: str) -> None:
    """What the tables change is a call that works, or their errors would mean nothing."""
    call = CALLS[name]
    call.callable(device)(**call.arguments(device), **({"backend": backend} if "backend" in call.kinds else {}))


@pytest.mark.parametrize("name", [name for name in MODULES | OTHERS if not name.startswith("data.load")])
def test_a_good_call_of_a_module_or_a_plot_passes(name: str, device: str) -> None:
    call = CALLS[name]
    call.callable(device)(**call.arguments(device))


# ------------------------------------------------------------------------------------------------- nothing left out


def parameters(function: Any) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name != "self"}


@pytest.mark.parametrize("name", CALLS)
def test_every_parameter_has_a_kind(name: str) -> None:
    call = CALLS[name]
    assert set(call.kinds) == parameters(call.function)
    assert all(KINDS[kind] for kind in call.kinds.values())


def test_everything_public_is_called() -> None:
    functions = {name for name in gssf_triton.__all__ if callable(getattr(gssf_triton, name))}
    assert functions | {f"metrics.{name}" for name in metrics.__all__} <= set(FUNCTIONS)
    for name in nn.__all__:
        methods = ["forward"] + (["paired", "transform"] if name == "GSSF" else [])
        assert {f"nn.{name}", *(f"nn.{name}.{method}" for method in methods)} <= set(MODULES)
    plots = {
        name for name, thing in vars(viz).items()
        if inspect.isfunction(thing) and thing.__module__ == viz.__name__ and not name.startswith("_")
    }  # fmt: skip
    readers = {name for name in data.__all__ if name.startswith("load_")}
    assert {f"viz.{name}" for name in plots} | {f"data.{name}" for name in readers} <= set(OTHERS)
    assert "data.Glyphs.split" in OTHERS and callable(Glyphs.split)


# ------------------------------------------------------------------------------------- what several arguments make

TOGETHER: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    **{
        f"no weight, {name}": (name, {"W_diag": None, "W_blocks": None}, ["W_diag", "W_blocks", "None"])
        for name, call in (FUNCTIONS | OTHERS).items()
        if call.kinds.get("W_diag") == "W_diag" or name == "attention"
    },
    "neither term": ("nn.GSSF", {"diag": False, "blocks": False}, ["diag", "blocks", "False"]),
    "neither term of a head": ("heads.HeadMetric", {"diag": False, "blocks": False}, ["diag", "blocks", "False"]),
    "neither term of heads": ("nn.GSSFAttention", {"diag": False, "blocks": False}, ["diag", "blocks", "False"]),
    "heads that do not divide": ("nn.GSSFAttention", {"num_heads": 5}, ["num_heads", "48", "5"]),
    "values without keys": ("nn.GSSFAttention.forward", {"value": torch.ones(2, 4, D)}, ["key", "value", "(2, 4, 24)"]),
    "two masks": ("attention", {"is_causal": True}, ["attn_mask", "is_causal"]),
    "a camera alone": ("ranks", {"gallery_cams": None}, ["query_cams", "gallery_cams", "None"]),
    "ids alone": ("viz.similarity_histogram", {"a_ids": None}, ["a_ids", "b_ids", "None"]),
    "one pair": ("viz.relevance", {"a": torch.ones(1, D), "b": torch.ones(1, D)}, ["a", "(1, 24)", "at least 2"]),
    "no rows": ("viz.similarity_histogram", {"a": torch.ones(0, D)}, ["a", "b", "(0, 24)", "rows"]),
    "more folds than images": ("metrics.image_text", {"folds": M + 1}, ["folds", "between 1 and 4", "5"]),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_arguments_that_do_not_go_together(case: str, device: str) -> None:
    name, change, wanted = TOGETHER[case]
    call = CALLS[name]
    change = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in change.items()}
    if case.startswith("no rows"):
        change["a_ids"] = torch.arange(0, device=device)
    error = complaint(call.callable(device), call.arguments(device) | change)
    assert type(error) is ValueError, error
    assert_says(str(error), wanted)


def test_rows_pair_up_and_never_broadcast(backend: str, device: str) -> None:
    a = features(4, 24, device=device)
    with pytest.raises(ValueError, match=r"(?s)\(4, 24\).*\(1, 24\)"):
        gssf_triton.paired_sim(a, a[:1], **weights("diag+blocks", 3, 8, device=device), backend=backend)


def test_weights_that_disagree(device: str) -> None:
    metric = weights("diag+blocks", G, 8, device=device)
    error = complaint(gssf_triton.dense_metric, metric | {"W_diag": torch.ones(16, device=device)})
    assert_says(str(error), ["W_diag", "W_blocks", "(16,)", "(3, 8, 8)"])


def test_a_tensor_scalar_may_lie_on_the_cpu_and_have_any_one_element_shape(backend: str, device: str) -> None:
    call = distillation_call(device) | {"backend": backend}
    expected = gssf_triton.distillation_loss(**call)
    for scale in (torch.tensor(5.0), torch.tensor([[5.0]]), torch.tensor(5.0, dtype=torch.float64)):
        assert torch.equal(gssf_triton.distillation_loss(**call | {"logit_scale": scale}), expected)


def test_what_is_not_looked_at_need_not_fit() -> None:
    assert nn.GSSF(40, 32, blocks=False).W_blocks is None
    assert nn.InfoNCELoss(nn.GSSF(8, 8), max_logit_scale=float("inf")).logit_scale > 0


def test_what_is_easily_mistaken_is_pointed_out(device: str) -> None:
    a = torch.randn(4, 24, device=device)
    blocks = torch.randn(3, 8, 8, device=device)
    for wrong, hint in (
        ({"a": a.cpu().numpy(), "W_diag": torch.ones(24)}, "got ndarray (torch.from_numpy makes a tensor of it)"),
        ({"a": a, "W_diag": blocks}, "got (3, 8, 8) (blocks are given as W_blocks=)"),
        ({"a": a, "W_blocks": blocks[:, :4]}, "must have shape (G, B, B), square blocks, B >= 1, got (3, 4, 8)"),
    ):
        assert hint in str(complaint(gssf_triton.pairwise_sim, {"b": a, **wrong}))


@pytest.mark.kernels
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
