"""The Triton backend's operators: `torch.library` ops `gssf::…` with fake implementations and autograd.

An op's body runs opaquely under `torch.compile`; kernels, and Triton with them, are imported at its first call.
"""

from gssf_triton.ops.bilinear import fold, gradient, pairwise, unit_rows, unit_rows_vjp
from gssf_triton.ops.paired import paired
from gssf_triton.ops.terms import pairwise_terms

__all__ = ["fold", "gradient", "paired", "pairwise", "pairwise_terms", "unit_rows", "unit_rows_vjp"]
