"""One call held to float64 in one numerics, and where its result is wrong: which entries, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.check.calls import Call, Problem
from bench.operation import FLOOR, FLOOR_TF32, relative_error
from bench.operations.losses import BARS

#: Sides of a tile, and of its parts, that a fault's rows and columns may repeat with.
SIDES = (8, 16, 64, 128)
#: An entry is wrong beyond this multiple of the allowed relative error, of the largest entry's size.
FACTOR = 4.0
#: More residues than these are counted, not listed.
LISTED = 8

Finding = dict[str, Any]


def finding(name: str, ok: bool, **facts: Any) -> Finding:
    return {"name": name, "ok": ok, **facts}


class Numerics(NamedTuple):
    """A dtype of features and the float32 precision, with the largest error of a product, and of a chain of them."""

    dtype: torch.dtype
    precision: str
    product: float
    chain: float

    def bound(self, call: Call) -> float:
        """The largest error of a call's results."""
        return 0.0 if call.exact else self.chain if call.chain else self.product


#: A chain's is a loss's bar, and in TF32, where a product after another adds its bias to it, as much again for each of
#: three.
NUMERICS = {
    "fp32": Numerics(torch.float32, "highest", FLOOR["fp32"], BARS["fp32"]),
    "tf32": Numerics(torch.float32, "high", FLOOR_TF32, 3 * FLOOR_TF32),
    "fp16": Numerics(torch.float16, "highest", FLOOR["fp16"], max(FLOOR["fp16"], BARS["fp16"])),
    "bf16": Numerics(torch.bfloat16, "highest", FLOOR["bf16"], max(FLOOR["bf16"], BARS["bf16"])),
}


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    """Another value of a setting of torch's for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def held_to_float64(problem: Problem, name: str) -> tuple[Finding, dict[str, Tensor], dict[str, Tensor]]:
    """The finding, the call's results, and what they are in float64.

    Float64 is the torch backend's, which the tests hold to the definition.
    """
    call, numerics = problem.call, NUMERICS[name]
    bound = numerics.bound(call)
    exact = problem.double().results("torch")
    with setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, numerics.precision):
        found = problem.results("triton")
    if call.exact:
        worst, where = float((found["out"] != exact["out"]).double().mean()), "out"
    else:
        worst, where = max((relative_error(found[part], exact[part]), part) for part in found)
    facts = {"error": worst, "of": where, "bound": bound}
    return finding(f"{call.name}, {name}", worst <= bound, **facts), found, exact


def _places(index: Tensor) -> dict[str, Any]:
    """Residues of the places by side: listed where few, else how many of all."""
    found: dict[str, Any] = {}
    for side in SIDES:
        residues = torch.unique(index % side).tolist()
        found[f"mod {side}"] = residues if len(residues) <= LISTED else f"{len(residues)} of {side}"
    return found


def where_wrong(found: Tensor, exact: Tensor, bound: float) -> dict[str, Any]:
    """The largest error and where it is, the share of wrong entries, and their rows and columns by the tiles' sides."""
    if found.shape != exact.shape:
        return {"shape": list(found.shape), "wanted": list(exact.shape)}
    value, truth = found.detach().double().cpu(), exact.detach().double().cpu()
    if value.dim() == 0:
        value, truth = value.view(1), truth.view(1)
    error = (value - truth).abs()
    # A NaN or an Inf where one belongs is right.
    error[(value == truth) | (value.isnan() & truth.isnan())] = 0
    finite = truth[truth.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    wrong = ~(error <= FACTOR * bound * size)
    worst = torch.where(error.isnan(), float("inf"), error)
    largest = int(worst.argmax()) if error.numel() else 0
    facts: dict[str, Any] = {
        "largest_error": float(worst.max()) if error.numel() else 0.0,
        "at": [int(i) for i in torch.unravel_index(torch.tensor(largest), value.shape)],
        "found": str(float(value.flatten()[largest])),
        "wanted": str(float(truth.flatten()[largest])),
        "largest_entry": size,
        "wrong_share": float(wrong.double().mean()),
        "nan": int(value.isnan().sum()),
        "inf": int(value.isinf().sum()),
    }
    if bool(wrong.any()):
        at = wrong.nonzero()
        facts["columns"] = _places(at[:, -1])
        if value.dim() > 1:
            facts["rows"] = _places(at[:, -2])
    return facts
