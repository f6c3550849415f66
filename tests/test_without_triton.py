"""What the package asks for when it is imported, and what it does where Triton and matplotlib are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As if they were not installed: every finder says it has never heard of them. A finder in front of the others could
# only raise, which `importlib.util.find_spec` would pass on instead of answering None.
WITHOUT_TRITON = """
import sys
from pathlib import Path

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        if name.split(".")[0] in ("triton", "matplotlib"):
            return None
        return self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ("triton", "matplotlib"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} could be imported")
"""


def _run(program: str) -> None:
    """Run `program` in a process of its own, with no word of this one's choice between GPU and interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torch_backend_needs_neither_triton_nor_matplotlib() -> None:
    _run(
        WITHOUT_TRITON
        + """
import torch, gssf_triton, gssf_triton.data
from gssf_triton.nn import GSSF

a, b = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
W_diag, W_blocks = torch.randn(8, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
expected = a @ (torch.diag(W_diag) + torch.block_diag(*W_blocks)) @ b.T
for backend in ("auto", "torch"):
    torch.testing.assert_close(gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend=backend), expected)
torch.testing.assert_close(gssf_triton.paired_sim(a, b[:3], W_diag, W_blocks), expected.diagonal())
torch.testing.assert_close(gssf_triton.transform(a, W_diag, W_blocks) @ b.T, expected)

inputs = (a, b, W_diag, W_blocks)
weight = torch.randn_like(expected)
got = torch.autograd.grad((gssf_triton.pairwise_sim(a, b, W_diag, W_blocks) * weight).sum(), inputs)
wanted = torch.autograd.grad((expected * weight).sum(), inputs)
for gradient, reference in zip(got, wanted, strict=True):
    torch.testing.assert_close(gradient, reference)

metric = GSSF(8, block_size=4)
metric(a, b).sum().backward()
assert metric.W_diag.grad.abs().sum() > 0 and metric.W_blocks.grad.abs().sum() > 0
"""
    )


def test_triton_backend_says_how_to_get_triton() -> None:
    # The interpreter's switch does not help where there is no Triton to interpret with.
    _run(
        WITHOUT_TRITON
        + """
import os, torch, gssf_triton, gssf_triton.kernels

assert not hasattr(gssf_triton.kernels, "fold"), "whoever looks through all modules must not fail"
for switch in ("0", "1"):
    os.environ["TRITON_INTERPRET"] = switch
    for call in (gssf_triton.pairwise_sim, gssf_triton.paired_sim, gssf_triton.transform):
        tensors = [torch.ones(2, 4)] * (1 if call is gssf_triton.transform else 2)
        try:
            call(*tensors, torch.ones(4), backend="triton")
        except RuntimeError as error:
            assert 'pip install "triton>=3.6"' in str(error), error
        else:
            raise AssertionError(f"{call.__name__}: no error")
"""
    )


def test_import_touches_neither_triton_nor_the_gpu() -> None:
    _run(
        """
import sys, torch

before = set(sys.modules)
import gssf_triton, gssf_triton.autotune, gssf_triton.kernels, gssf_triton.nn

new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "matplotlib", "sklearn", "tqdm", "platformdirs"}, new
assert not torch.cuda.is_initialized()
"""
    )


def test_a_triton_too_old_is_told_apart(tmp_path: Path) -> None:
    """As torch 2.8 and 2.9 bring one: it must not be imported, the call names it, a GPU's call warns."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.5.1'\nraise ImportError('not to be imported')\n")
    _run(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
import types, warnings, torch, gssf_triton
from gssf_triton import backend

a = torch.ones(2, 4)
assert gssf_triton.pairwise_sim(a, a, torch.ones(4)).tolist() == [[4.0, 4.0], [4.0, 4.0]]
try:
    gssf_triton.pairwise_sim(a, a, torch.ones(4), backend="triton")
except RuntimeError as error:
    assert "3.6 or newer, 3.5.1 is installed" in str(error), error
else:
    raise AssertionError("no error")
on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert backend.resolve_backend("auto", on_gpu, None) == "torch"
assert len(caught) == 1 and "Triton 3.5.1 is older" in str(caught[0].message), caught
"""
    )
