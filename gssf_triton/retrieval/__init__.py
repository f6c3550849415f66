"""Retrieval without the score matrix: the best k gallery items of every query, and the rank of its first match.

`search` checks calls and folds the metric into the queries (`scoring`); `scan` and the Triton kernels walk chunks of
scores; `sharding` merges what several processes found; `order` says what comes before what.
"""

from gssf_triton.retrieval.search import ranks, topk

__all__ = ["ranks", "topk"]
