"""Retrieval without the score matrix: the best k gallery items of every query, and the rank of its first match.

`query` is a call as one checked value, `scoring` folds its metric and cuts the gallery into chunks, `scan` and `triton`
pass over them, `sharding` merges what several processes found, `order` says what comes before what.
"""

from gssf_triton.retrieval.search import ranks, topk

__all__ = ["ranks", "topk"]
