"""Numbers that more than one layer must agree on."""

from __future__ import annotations

#: Smallest norm a row is divided by, as torch.nn.functional.normalize has it.
NORM_EPS = 1e-12
