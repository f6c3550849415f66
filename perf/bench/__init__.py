"""The benchmark's parts; the programs that use them lie beside this folder.

Importing it makes the checkout's package importable where it is not installed, and imports nothing itself.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]

for _folder in ("kernels", "autotune"):
    if not (ROOT / "gssf_triton" / _folder / "__init__.py").exists():
        raise SystemExit(f"gssf_triton/{_folder} must be a link or a folder: docs/architecture.md says how to clone")

_found = find_spec("gssf_triton")
#: True where the package that is installed is this checkout's.
INSTALLED = _found is not None and _found.origin == str(ROOT / "gssf_triton" / "__init__.py")
if not INSTALLED:
    sys.path.insert(0, str(ROOT))
