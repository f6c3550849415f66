"""Where a result is wrong: which entries, and what their places have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Sides of a tile, and of its parts, that a fault's rows and columns may repeat with.
SIDES = (8, 16, 64, 128)
#: An entry is wrong beyond this multiple of the allowed relative error, of the largest entry's size.
FACTOR = 4.0
#: Residues are listed up to as many; more of them say no more than "most".
LISTED = 8


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
