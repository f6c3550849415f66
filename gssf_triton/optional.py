"""Libraries that may be missing: each comes with an extra of the package."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Raises:
        ModuleNotFoundError: it is not installed, or lacks one of its own dependencies.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # If one of the library's own dependencies is missing, let that error through.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f'{module} is not installed: pip install "gssf_triton[{extra}]"', name=error.name
        ) from None
