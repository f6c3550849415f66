"""Triton kernels and their launchers.

`tile` holds what every kernel shares: the similarity tile (load, fold, product). A kernel's file holds the kernel and
its launcher. Importing this package does not import Triton. `kernels.fold` imports its module at first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gssf_triton.kernels import cross_attention as cross_attention
    from gssf_triton.kernels import fold as fold
    from gssf_triton.kernels import gradient as gradient
    from gssf_triton.kernels import late_interaction as late_interaction
    from gssf_triton.kernels import launch as launch
    from gssf_triton.kernels import paired as paired
    from gssf_triton.kernels import pairwise as pairwise
    from gssf_triton.kernels import prepare as prepare
    from gssf_triton.kernels import rank as rank
    from gssf_triton.kernels import ranked_tile as ranked_tile
    from gssf_triton.kernels import stream as stream
    from gssf_triton.kernels import tile as tile
    from gssf_triton.kernels import topk as topk
    from gssf_triton.kernels import unit as unit


def __getattr__(name: str) -> ModuleType:
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        why = "" if error.name == module else f": {error}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{why}") from error
