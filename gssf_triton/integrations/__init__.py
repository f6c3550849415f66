"""GSSF inside other libraries, one module and one optional extra a library.

`gssf_triton.integrations.faiss`, `.arrays`, `.pytorch_metric_learning`, `.sentence_transformers`, `.open_clip`,
`.transformers` and `.timm`. `import gssf_triton` imports none of them and does not depend on what is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(x: Any) -> Tensor:
    """`torch.as_tensor`, for any array: it shares the array's memory if PyTorch can, and is a copy otherwise.

    PyTorch refuses swapped bytes and negative strides, and warns about read-only arrays (memory-mapped ones).
    """
    if not isinstance(x, np.ndarray):
        return torch.as_tensor(x)
    plain = x.dtype.isnative and x.flags.writeable and all(stride >= 0 for stride in x.strides)
    return torch.from_numpy(x if plain else np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
