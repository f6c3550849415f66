"""Numbers that more than one layer must agree on."""

from __future__ import annotations

#: Smallest norm a row is divided by, as torch.nn.functional.normalize has it.
NORM_EPS = 1e-12

#: SCAN's attention (Lee et al., ECCV 2018): slope of its LeakyReLU, and what its norm over the words is kept above.
LEAKY_SLOPE = 0.1
ATTENTION_EPS = 1e-8
