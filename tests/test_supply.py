"""What reaches a user: nobody's pickle is loaded, nothing calls out, versions are pinned."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("gssf_triton", "kernels", "autotune", "perf", "examples")

#: Modules that unpickle, call out, or run what they read.
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("socket", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "wget"),
}
#: Calls that unpickle unless they are told not to, and what tells them.
LOADERS = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}


def sources() -> list[Path]:
    return [path for folder in SHIPPED for path in sorted((ROOT / folder).rglob("*.py"))]


def nodes(source: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(source))


def imported(source: str) -> set[str]:
    """Top-level names of the modules that a source imports, wherever in it."""
    found: set[str] = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def unsafe_loads(source: str) -> list[str]:
    """Calls of a loader that do not forbid pickles in so many words."""
    found = []
    for node in nodes(source):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = getattr(node.func.value, "id", "")
        if (owner, node.func.attr) not in LOADERS:
            continue
        keyword, wanted = LOADERS[owner, node.func.attr]
        given = {k.arg: k.value for k in node.keywords}.get(keyword)
        if not (isinstance(given, ast.Constant) and given.value is wanted):
            found.append(f"{owner}.{node.func.attr} in line {node.lineno}")
    return found


def test_the_checks_below_see_what_they_are_for() -> None:
    assert unsafe_loads("np.load(p)\ntorch.load(p, weights_only=False)\nnp.load(p, allow_pickle=False)") == [
        "np.load in line 1",
        "torch.load in line 2",
    ]
    assert imported("def f():\n    from urllib.request import urlopen") & FORBIDDEN_MODULES == {"urllib"}


def test_no_source_unpickles_or_calls_out() -> None:
    found = {}
    for path in sources():
        source = path.read_text(encoding="utf-8")
        faults = [*sorted(imported(source) & FORBIDDEN_MODULES), *unsafe_loads(source)]
        found |= {str(path.relative_to(ROOT)): faults} if faults else {}
    assert not found


def test_nothing_calls_out_at_run_time() -> None:
    """Imports, a call, a loss, a search, the data set and a tuner's look-up in a process that cannot open a socket."""
    program = """
import socket

def refuse(*_, **__):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, gssf_triton, gssf_triton.autotune, gssf_triton.data, gssf_triton.viz
from gssf_triton.nn import GSSF, InfoNCELoss

a, b = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
metric = GSSF(32, block_size=8)
InfoNCELoss(metric)(a, b).backward()
gssf_triton.topk(a.detach(), b, metric.W_diag, metric.W_blocks, k=3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in pins if line and not line.startswith("#")}
    wanted = {canonicalize_name(Requirement(line).name) for line in metadata.requires("gssf_triton") or []}
    assert {"torch", "numpy", "ruff"} <= wanted
    # Triton comes in the release that goes with torch's build; the extras name the package itself.
    assert wanted - {"triton", "gssf-triton"} <= pinned
