"""Images of many regions against captions of many words, without the regions × words scores.

`scores` checks calls and folds the metric; `ops` are the differentiable operators, computed by `torch_backend` and
`torch_cross_attention`, chunk by chunk, or by `triton_backend`; `packing` leaves out whole tiles of padding.
"""

from gssf_triton.region_word.scores import cross_attention_sim, late_interaction

__all__ = ["cross_attention_sim", "late_interaction"]
