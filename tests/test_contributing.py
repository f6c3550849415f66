"""CONTRIBUTING.md's worked example runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: What the files that the text names have at hand.
IMPORTS = {
    "torch": """
from __future__ import annotations
from gssf_triton.kernels.stream_values import Epilogue, Kept
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk, merge_sums
""",
    "triton": """
from __future__ import annotations
import triton
import triton.language as tl
""",
}


def test_a_new_epilogue(backend: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.kernels import epilogues as kernels
    from gssf_triton.streaming import epilogues

    section = TEXT.split("## How to add an epilogue")[1].split("\n## ")[0]
    in_torch, in_triton, use = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert sum(bool(line.strip()) for line in (in_torch + in_triton + use).splitlines()) <= 40
    # Triton reads a kernel's source from its file.
    for name, code in (("torch", in_torch + use), ("triton", in_triton)):
        (tmp_path / f"example_{name}.py").write_text(IMPORTS[name] + code, encoding="utf-8")
    # Put back as it was when the test ends.
    monkeypatch.setitem(epilogues.EPILOGUES, "count_above", None)
    modules = {}
    for name in IMPORTS:
        spec = importlib.util.spec_from_file_location(f"example_{name}", tmp_path / f"example_{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    monkeypatch.setattr(kernels, "count_above", modules["triton"].count_above, raising=False)
    t, y = torch.randn(40, 12, device=device), torch.randn(70, 12, device=device)
    with choice.use(chunk=ChunkConfig(16, 33)):
        counts = modules["torch"].count_above(t, y, 0.5, backend)
    S = t.double() @ y.double().T
    clear = ((S - 0.5).abs() > 1e-4).all(1)  # rounding decides the others
    assert clear.any() and counts[clear].equal((S > 0.5).sum(1)[clear])
