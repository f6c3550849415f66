"""The package on a path without an installation: its folders copied to where a wheel would have them.

Nothing is imported here that may be missing or broken.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gssf_triton"
#: Folders of the checkout that are subpackages.
SUBPACKAGES = ("kernels", "autotune")
#: Where Triton looks for its assembler; newer versions take the second for all newer architectures.
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
#: Folders of what is compiled or tuned, by the variable that chooses them.
CACHES = {"TRITON_CACHE_DIR": "triton", "GSSF_CACHE_DIR": "gssf", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
#: Where the layout lies, for the programs that this one starts.
VARIABLE = "GSSF_LAYOUT"


def lay_out(folder: Path) -> Path:
    """Copy the package into `folder`, which is then to be put on the path."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=ignored)
    for name in SUBPACKAGES:
        shutil.copytree(ROOT / name, folder / PACKAGE / name, ignore=ignored)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """What a program needs in its environment to import the package from `folder`; bytecode and caches go there, too.

    Caches that were chosen before stay where they are.
    """
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = {"PYTHONPATH": path, VARIABLE: str(folder), "PYTHONPYCACHEPREFIX": str(folder / "pycache")}
    for variable, name in CACHES.items():
        chosen[variable] = os.environ.get(variable) or str(folder / name)
    return chosen


def assembled_with(path: str) -> dict[str, str]:
    """The environment in which Triton uses this ptxas.

    Raises:
        ValueError: there is no program.
    """
    if not os.access(path, os.X_OK):
        raise ValueError(f"{path} is no program")
    return dict.fromkeys(ASSEMBLERS, os.path.abspath(path))


def source_digest() -> str:
    """What the code is known by where there is no git: a hash of the package's sources and of this folder's."""
    digest = hashlib.sha256()
    for name in (PACKAGE, *SUBPACKAGES, "perf"):
        for path in sorted((ROOT / name).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _is_installed() -> bool:
    """Whether `import gssf_triton` finds this checkout's package whole."""
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    found = importlib.util.find_spec(PACKAGE)
    return found is not None and found.origin == str(ROOT / PACKAGE / "__init__.py")


def ensure() -> None:
    """Make the checkout's package importable here and in what is started from here, until this program ends."""
    if PACKAGE in sys.modules or os.environ.get(VARIABLE) or _is_installed():
        return
    folder = Path(tempfile.mkdtemp(prefix="gssf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= environment(lay_out(folder))
    sys.path.insert(0, str(folder))
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]
