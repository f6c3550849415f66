"""A clone of the repository keeps two subpackages beside the package, where an installation has them in it.

Python started in a clone finds the clone's package before an installed one: it is whole there, too.
"""

from __future__ import annotations

from pathlib import Path

import gssf_triton

PACKAGE = Path(__file__).parent
if not (PACKAGE / "kernels").exists() and (PACKAGE.parent / "kernels" / "launch.py").exists():
    gssf_triton.__path__.append(str(PACKAGE.parent))
