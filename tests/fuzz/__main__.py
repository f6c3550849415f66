"""`python tests/fuzz`: see `loop`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# As tests/conftest.py does for the tests: their folder on the path, and Triton's interpreter where there is no GPU.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
if "TRITON_INTERPRET" not in os.environ:
    import torch

    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from support.interpreter import remember_lookups  # noqa: E402

from fuzz.loop import main  # noqa: E402
from gssf_triton.backend import HAS_TRITON  # noqa: E402

if HAS_TRITON and os.environ["TRITON_INTERPRET"] == "1":
    remember_lookups()

if __name__ == "__main__":
    sys.exit(main())
