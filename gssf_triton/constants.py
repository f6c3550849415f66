"""Numbers that more than one layer must agree on."""

from __future__ import annotations

#: Smallest norm a row is divided by, as in torch.nn.functional.normalize.
NORM_EPS = 1e-12

#: SCAN's attention (Lee et al., ECCV 2018): the slope of its LeakyReLU, and what is added to its norm over the words.
LEAKY_SLOPE = 0.1
ATTENTION_EPS = 1e-8
