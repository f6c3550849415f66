"""The compile gate: each rule catches a fault that is planted on purpose, and good kernels pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gssf_triton.autotune import compile_gate
from gssf_triton.autotune.binary import Facts
from gssf_triton.autotune.compile_gate import RULES, Case, faults
from gssf_triton.autotune.compiled import Compiled, Dot, dots_of
from gssf_triton.autotune.rehearsal import TILE, Launch
from gssf_triton.autotune.ttgir import Access
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.args import Blocks, Matrix, Tile, Weights

pytestmark = pytest.mark.kernels

#: Compiles planted kernels and configurations in a process without the interpreter, and prints the gate's faults.
PROGRAM = """
import json
from unittest import mock
import torch
from support import planted_kernels
import gssf_triton
from gssf_triton.autotune import compile_gate
from gssf_triton.autotune.compiled import compile_launch
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import PairwiseConfig
from gssf_triton.autotune.public_calls import pairwise
from gssf_triton.autotune.rehearsal import recording


def empty(*shape):
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16)


def store(hint):
    x, s = empty(1024, 64), empty(1024, 1024)
    planted_kernels.narrow_store_kernel[(16, 16)](
        x, x.stride(0), s, s.stride(0), 1024, 1024, BLOCK_M=64, BLOCK_N=64, HINT=hint, num_warps=4, num_stages=1
    )


def product(gather):
    a, b, s = empty(128, 1024), empty(128, 1024), empty(128, 128)
    planted_kernels.product_kernel[(1,)](
        a, *a.stride(), b, *b.stride(), s, s.stride(0), 1024, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GATHER=gather,
        num_warps=8, num_stages=3,
    )


def tile(*config, B=32, **options):
    with choice.use(pairwise=PairwiseConfig(*config, **options)):
        pairwise(1024, 1024, B, plan="one_pass", normalize=False).rehearse(tape, "bf16")


def undrained(*config, **options):
    # With both stores in one kernel the assembler serialises nothing.
    no = {name: mock.Mock(return_value=False) for name in ("drains", "stores_both")}
    with mock.patch.multiple("gssf_triton.kernels.pairwise", **no):
        tile(*config, **options)


PLANTED = {
    "narrow": lambda: store(False),
    "wide": lambda: store(True),
    "gathered": lambda: product(True),
    "pipelined": lambda: product(False),
    "serialised": lambda: undrained(128, 128, 32, num_warps=8, num_stages=3),
    "spilling": lambda: tile(128, 256, 64, num_warps=4, num_stages=2),
    "too large": lambda: tile(128, 128, 128, num_warps=8, num_stages=6),
    "illegal": lambda: tile(24, 128, 64, num_warps=8, num_stages=3),
}
said = {}
with recording("sm_90") as tape:
    for name, plant in PLANTED.items():
        tape.cut()
        if name in ("narrow", "wide", "gathered", "pipelined"):
            plant()
            record = tape.cut()
        else:
            rehearse = tape.cut
            records = []
            tape.cut = lambda: records.append(rehearse()) or records[-1]
            plant()
            tape.cut = rehearse
            record = next(r for r in records if any(l.kernel == "pairwise_kernel" for l, _ in r.launches))
        launch, grid = next((l, g) for l, g in record.launches if l.kernel != "fold_kernel")
        said[name] = compile_gate.faults(compile_gate.Case(launch, grid, name), compile_launch(launch))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("narrow", "moves 2 bytes a lane"),
        ("gathered", "in a loop is not asynchronous"),
        ("serialised", "is serialised"),
        ("spilling", "spills ("),
        ("too large", "bytes of shared memory, a block has 232,448"),
        ("illegal", "does not compile: "),
    ],
)
def test_a_planted_fault_is_caught(planted: dict[str, list[str]], name: str, wanted: str) -> None:
    assert any(wanted in text for text in planted[name]), planted[name]


@pytest.mark.parametrize("name", ["wide", "pipelined"])
def test_the_same_kernel_without_its_fault_passes(planted: dict[str, list[str]], name: str) -> None:
    assert planted[name] == []


# ---------------------------------------------------------------------------------------- rules on facts alone

A = Matrix("*bf16", "constexpr", "i32", "constexpr")


def launch_of(blocks: bool = True) -> Launch:
    """A launch of the one-pass kernel, with a fold by blocks or without."""
    weights = Weights("constexpr", Blocks("*bf16", "i32", "i32", "constexpr") if blocks else "constexpr")
    signature = (("a", A), ("weights", weights), ("s_ptr", "*bf16"), ("TILE", "constexpr"))
    tile = (TILE, Tile.__module__, "Tile", (("BLOCK_M", 64), ("PRECISION", "ieee")))
    blocks_at = (((1, 1, 3), 1),) if blocks else (((1, 1), None),)
    constants = (((0, 1), None), ((0, 3), 1), ((1, 0), None), *blocks_at, ((3,), tile))
    divisible = (("tt.divisibility", 16),)
    attributes = tuple((path, divisible) for path in ((0, 0), (0, 2), (1, 1, 0), (1, 1, 1), (1, 1, 2)))
    options = (("num_warps", 8), ("num_stages", 3))
    return Launch("sm_90", "gssf_triton.kernels.pairwise", "pairwise_kernel", signature, constants, attributes, options)


LAUNCH = launch_of()
GOOD = Facts(registers=128, shared=1000, tensor_ops=4, wgmma=(("m64n128k16", 4, 0),))
DOTS = (Dot(128, "bf16", "ieee"),)


def access(**changes: Any) -> Access:
    fields: dict[str, Any] = {
        "kind": "store", "argument": "s_ptr", "shape": (128, 128), "bits": 16, "vector_bytes": 16, "run_bytes": 256,
        "in_loop": False, "feeds_dot": False, "per_thread": 64,
    }  # fmt: skip
    return Access(**fields | changes)


def said(facts: Facts, grid: tuple[int, ...] = (1,), launch: Launch = LAUNCH, dots: tuple[Dot, ...] = DOTS) -> str:
    return "; ".join(faults(Case(launch, grid, "a call"), Compiled(facts, dots)))


def changed(**changes: Any) -> Facts:
    return replace(GOOD, **changes)


def test_a_launch_names_every_argument() -> None:
    launch = launch_of()
    assert launch.strides == [
        "a.batch",
        "a.row",
        "a.channel",
        "weights.blocks.group",
        "weights.blocks.p",
        "weights.blocks.q",
    ]
    assert launch.is_divisible("a.row") and not launch.is_divisible("a.channel") and launch.constant("a.channel") == 1
    assert (launch.constant("BLOCK_M"), launch.numerics, launch.tile) == (64, "bf16", "M64 w8 s3")
    assert launch.arguments()["weights"] == Weights(None, Blocks("*bf16", "i32", "i32", 1))
    assert launch.arguments()["TILE"].BLOCK_M == 64


def test_a_good_kernel_passes() -> None:
    assert said(changed(accesses=(access(), access(kind="async", in_loop=True, feeds_dot=True)))) == ""


FAULTS = {
    "compiles": (changed(error="E"), "does not compile: E"),
    "shared memory": (changed(shared=232_449), "232,449 bytes"),
    "spills": (changed(spills=8), "spills (8)"),
    "tensor cores": (changed(tensor_ops=0, wgmma=(), mma_sync=4), "no wgmma.mma_async"),
    "serialised": (changed(serialised=("C7515 …",)), "is serialised: C7515"),
    "narrow accesses": (changed(accesses=(access(vector_bytes=2),)), "moves 2 bytes a lane"),
    "synchronous loads": (
        changed(accesses=(access(kind="load", argument="a.ptr", in_loop=True, feeds_dot=True),)), "not asynchronous",
    ),
    "strided warps": (changed(accesses=(access(run_bytes=2),)), "a warp's run is 2 bytes"),
    "register hazard": (changed(hazards=("R4 …",)), "overwrites an operand"),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_names_what_is_wrong(rule: str) -> None:
    facts, wanted = FAULTS[rule]
    assert wanted in said(facts)


def test_a_grid_that_passes_the_limit_is_a_fault() -> None:
    assert "a grid of 2,147,483,648 programs" in said(GOOD, (2**31,))
    assert said(GOOD, (2**31 - 1, 65_535)) == ""
    assert "65,536" in said(GOOD, (1, 65_536))


@pytest.mark.parametrize("is_safe", [True, False])
def test_operands_from_registers_want_a_safe_assembler(is_safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = changed(wgmma=(("m64n128k16", 8, 4),))
    monkeypatch.setattr(toolchain, "toolchain", lambda arch: SimpleNamespace(is_safe=is_safe))
    wanted = "" if is_safe else "4 products take an operand from registers, which this assembler may overwrite"
    assert said(facts, launch=LAUNCH) == wanted


def test_operands_from_registers_must_be_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "toolchain", lambda arch: SimpleNamespace(is_safe=True))
    facts = changed(wgmma=(("m64n128k16", 8, 4),))
    assert "`kernels.toolchain` does not know it" in said(facts, launch=launch_of(blocks=False))


def test_chained_products_are_a_fault_of_old_releases_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, blackwell = changed(chained=True), replace(LAUNCH, arch="sm_100")
    monkeypatch.setattr(compile_gate, "TRITON_RELEASE", (3, 8))
    assert said(facts) == "", "only there"
    assert "chains products" in said(facts, launch=blackwell)
    monkeypatch.setattr(compile_gate, "TRITON_RELEASE", (3, 9))
    assert said(facts, launch=blackwell) == ""


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule.name for rule in RULES} == {*FAULTS, "grid", "register operands", "chained products"}


def test_what_strides_do_not_allow_is_no_fault() -> None:
    odd = replace(LAUNCH, attributes=LAUNCH.attributes[:1])  # rows that are not 16 bytes apart
    assert said(changed(accesses=(access(vector_bytes=2, run_bytes=64),)), launch=odd) == ""
    assert said(changed(accesses=(access(vector_bytes=4, per_thread=2),))) == "", "a lane holds no more"
    assert said(changed(accesses=(access(vector_bytes=2, run_bytes=2, shape=(128,)),))) == "", "a vector, not a tile"


def test_products_are_read_from_the_compilers_own_text() -> None:
    text = """
    %s = tt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor<128x128xf32> loc(#loc1)
    %t = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<16x64xf32> * tensor<64x32xf32> -> tensor<16x32xf32>
    %u = tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x32xf32> -> tensor<64x32xf32> loc(#loc2)
    """
    assert dots_of(text) == (Dot(128, "bf16", "ieee"), Dot(16, "f32", "tf32x3"), Dot(64, "f32", "ieee"))
    assert [dot.wants_tensor_cores for dot in dots_of(text)] == [True, True, False]
