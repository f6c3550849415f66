"""The one-pass kernel's default tiles keep Hopper's tensor cores busy: ptxas does not serialise their products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gssf_triton.kernels.configs import PairwiseConfig, drains, pairwise_config

pytestmark = pytest.mark.kernels

#: Compiles what the calls launch, in a process whose decorators compile; prints the gate's verdict on each, and how
#: wide a lane's stores are.
PROGRAM = """
import json
from dataclasses import replace
import gssf_triton
from gssf_triton.autotune.compile_gate import Case, faults
from gssf_triton.autotune.compiled import compile_launch
from gssf_triton.autotune.public_calls import pairwise
from gssf_triton.autotune.rehearsal import recording

def one_pass(M, B):
    return replace(pairwise(M, M, B, plan="one_pass", normalize=False), backward=False)

CALLS = {
    "large, bf16": (one_pass(8192, 16), "bf16"),
    "small, bf16": (one_pass(256, 16), "bf16"),
    "diagonal alone, bf16": (one_pass(256, 0), "bf16"),
    "tf32": (one_pass(8192, 8), "tf32"),
    "terms, bf16": (replace(one_pass(8192, 32), run=lambda **x: sum(gssf_triton.pairwise_terms(**x))), "bf16"),
}
said = {}
with recording("sm_90") as tape:
    for name, (call, numerics) in CALLS.items():
        found = [(launch, grid) for launch, grid in call.rehearse(tape, numerics)[0].launches]
        assert [launch.kernel for launch, _ in found] == ["pairwise_kernel"], found
        (launch, grid), = found
        made = compile_launch(launch)
        stores = sorted({x.vector_bytes for x in made.facts.accesses if x.kind == "store"})
        said[name] = faults(Case(launch, grid, name), made), stores
print(json.dumps(said))
"""


def test_no_default_tile_is_serialised(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[list[str], list[int]]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5 and {name: faults for name, (faults, _) in found.items() if faults} == {}
    # Even S by 16 bytes, ragged S by numbers, both in one kernel; with two terms a kernel each.
    numbers = {name: [4, 16] if name == "tf32" else [16] if "terms" in name else [2, 16] for name in found}
    assert {name: stores for name, (_, stores) in found.items()} == numbers


def test_products_stay_in_flight_where_the_assembler_copes() -> None:
    half, full = torch.bfloat16, torch.float32
    large = pairwise_config(8192, 8192, 1024, 16, half, "sm_90")
    small = pairwise_config(256, 256, 1024, 16, half, "sm_90")
    assert not drains(large, 16, half, "sm_90", terms=False)
    assert drains(small, 16, half, "sm_90", terms=False)
    assert drains(large, 16, full, "sm_90", terms=False) and drains(large, 16, half, "sm_90", terms=True)
    assert not drains(small, 128, half, "sm_90", terms=False), "a fold in a loop of its own"
    assert not any(drains(small, 16, half, arch, terms=True) for arch in ("sm_80", "sm_100", "gfx942", "interpreter"))
    assert drains(PairwiseConfig(128, 128, 32, num_warps=8, num_stages=3), 16, half, "sm_90", terms=False)
