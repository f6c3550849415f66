"""Programs run from a checkout in which nothing is installed: what they need in their environment.

Nothing is imported here that may be missing or broken.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from bench import INSTALLED, ROOT

#: Where this package and gssf_triton are found.
PATH = (ROOT, ROOT / "perf")
#: Folders whose sources decide what is measured.
SOURCES = ("gssf_triton", "kernels", "autotune", "perf")
#: Where Triton looks for its assembler; newer versions take the second for all newer architectures.
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
#: Read when cuBLAS's first handle is made: without it products may not repeat under deterministic algorithms.
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}
#: Folders of what is compiled or tuned, by the variable that chooses them.
CACHES = {"TRITON_CACHE_DIR": "triton", "GSSF_CACHE_DIR": "gssf", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def environment(caches: Path) -> dict[str, str]:
    """For a program that imports from the checkout, writes nothing there and has its caches in a folder."""
    path = [*map(str, PATH), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return chosen | {variable: str(caches / name) for variable, name in CACHES.items()}


def keep_clean() -> None:
    """Where the package is not installed: nothing that is compiled, tuned or imported is kept beyond this program.

    Caches that were chosen before stay where they are.
    """
    if INSTALLED or all(variable in os.environ for variable in CACHES):
        return
    caches = Path(tempfile.mkdtemp(prefix="gssf-"))
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    os.environ |= environment(caches) | {name: os.environ[name] for name in CACHES if name in os.environ}


def assembled_with(path: str) -> dict[str, str]:
    """The environment in which Triton uses this ptxas, for argparse."""
    if not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{path} is no program")
    return dict.fromkeys(ASSEMBLERS, os.path.abspath(path))


def source_digest() -> str:
    """A hash of the sources: what the code is known by where there is no git."""
    digest = hashlib.sha256()
    for name in SOURCES:
        for path in sorted((ROOT / name).rglob("*.py")):
            # Links to folders that are hashed where they lie; some copies hold the folders in their place.
            if path.relative_to(ROOT).parts[:2] in (("gssf_triton", "kernels"), ("gssf_triton", "autotune")):
                continue
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
