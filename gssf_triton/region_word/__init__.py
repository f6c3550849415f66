"""Images of many regions against captions of many words, without the regions × words scores.

`scores` checks calls and folds the metric; `ops` are the differentiable operators, computed by `torch_backend`, a chunk
of `pairs` at a time, or by `triton_backend`; `packing` leaves padding out.
"""

from gssf_triton.region_word.scores import cross_attention_sim, late_interaction

__all__ = ["cross_attention_sim", "late_interaction"]
