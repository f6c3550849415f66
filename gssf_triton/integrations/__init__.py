"""GSSF inside other libraries, one module and one optional extra a library.

`gssf_triton.integrations.faiss`, `.arrays`, `.pytorch_metric_learning`, `.sentence_transformers`, `.open_clip`,
`.transformers` and `.timm`. None is imported by `import gssf_triton`, whose behaviour does not depend on what is
installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType


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
