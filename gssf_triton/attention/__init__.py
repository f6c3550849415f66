"""Attention whose scores are GSSF similarities."""

from gssf_triton.attention.functional import attention

__all__ = ["attention"]
