"""Losses over the GSSF similarities of a batch that never store its M×N matrix.

Each file holds one loss: the public function, and the `Loss` over `gssf::stream` that computes it.
"""

from gssf_triton.losses.distillation import distillation_loss
from gssf_triton.losses.info_nce import info_nce
from gssf_triton.losses.sigmoid import sigmoid_loss
from gssf_triton.losses.triplet import triplet_loss

__all__ = ["distillation_loss", "info_nce", "sigmoid_loss", "triplet_loss"]
