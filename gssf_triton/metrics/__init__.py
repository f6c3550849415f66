"""The field's retrieval metrics under the learned similarity, in percent, without the score matrix.

Both sides are normalised unless `normalize=False` says otherwise. Ties are resolved as `gssf_triton.topk` resolves
them: the item of the lower index comes first. Rows that hold NaN or infinity are counted in a warning.
"""

from __future__ import annotations

from gssf_triton.metrics.image_text import image_text
from gssf_triton.metrics.reid import reid
from gssf_triton.metrics.retrieval import retrieval

__all__ = ["image_text", "reid", "retrieval"]
