"""GSSF inside other libraries, one module and one optional extra a library.

`gssf_triton.integrations.faiss`, `.arrays`, `.pytorch_metric_learning`, `.sentence_transformers`, `.open_clip`,
`.transformers` and `.timm`. None is imported by `import gssf_triton`, whose behaviour does not depend on what is
installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A library that is there but lacks one of its own dependencies has its own tale to tell.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f'{module} is not installed: pip install "gssf_triton[{extra}]"', name=error.name
        ) from None


def as_tensor(x: Any) -> Tensor:
    """`torch.as_tensor` of any array too, in its memory where PyTorch takes it.

    PyTorch takes no array whose bytes are swapped or whose strides are negative, and warns of one that it could not
    write to, such as a memory-mapped one: nothing here writes.
    """
    if not isinstance(x, np.ndarray):
        return torch.as_tensor(x)
    plain = x.dtype.isnative and x.flags.writeable and all(stride >= 0 for stride in x.strides)
    return torch.from_numpy(x if plain else np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
