"""The facts about compiled kernels, read from texts: planted faults of each kind, and one real compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gssf_triton.autotune import binary, sass, ttgir
from gssf_triton.autotune.binary import Facts, Work
from gssf_triton.autotune.ttgir import Access

HEADER = """
#rows = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#scalars = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>
#strided = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [1, 4], order = [0, 1]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}>
#fma = #ttg.amd_mfma<{version = 3, warpsPerCTA = [2, 2], instrShape = [32, 32, 8], isTransposed = true}>
#bits = #ttg.linear<{register = [[0, 1], [0, 2], [8, 0]], lane = [[0, 4], [1, 0], [2, 0]], warp = [[16, 0]]}>
#shared = #ttg.nvmma_shared<{swizzlingByteWidth = 128, transposed = false, elementBitWidth = 16}>
#tmem = #ttng.tensor_memory_encoding<blockM = 128, blockN = 64, colStride = 1>
#smem = #ttg.shared_memory
"""


def kernel(body: str, arguments: str = "%a_ptr: !tt.ptr<bf16>, %s_ptr: !tt.ptr<bf16>, %stride: i32") -> ttgir.Module:
    return ttgir.Module(
        f"""{HEADER}
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 4 : i32, "ttg.threads-per-warp" = 32 : i32}} {{
  tt.func public @kernel({arguments}) attributes {{noinline = false}} {{
{body}
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""
    )


def address(layout: str, base: str = "%a_ptr", name: str = "%p") -> str:
    """Addresses of a 64 × 64 tile whose rows lie `%stride` apart and whose columns lie side by side."""
    row = f"tensor<64xi32, #ttg.slice<{{dim = 1, parent = {layout}}}>>"
    column = f"tensor<64xi32, #ttg.slice<{{dim = 0, parent = {layout}}}>>"
    tile = f"tensor<64x64x!tt.ptr<bf16>, {layout}>"
    return f"""
    {name}0 = tt.make_range {{end = 64 : i32, start = 0 : i32}} : {row} loc(#loc)
    {name}1 = tt.splat %stride : i32 -> {row} loc(#loc)
    {name}2 = arith.muli {name}0, {name}1 : {row} loc(#loc)
    {name}3 = tt.expand_dims {name}2 {{axis = 1 : i32}} : {row} -> tensor<64x1xi32, {layout}> loc(#loc)
    {name}4 = tt.splat {base} : !tt.ptr<bf16> -> tensor<64x1x!tt.ptr<bf16>, {layout}> loc(#loc)
    {name}5 = tt.addptr {name}4, {name}3 : tensor<64x1x!tt.ptr<bf16>, {layout}>, tensor<64x1xi32, {layout}> loc(#loc)
    {name}6 = tt.broadcast {name}5 : tensor<64x1x!tt.ptr<bf16>, {layout}> -> {tile} loc(#loc)
    {name}7 = tt.make_range {{end = 64 : i32, start = 0 : i32}} : {column} loc(#loc)
    %zero = arith.constant dense<0> : {column} loc(#loc)
    {name}8 = arith.select %valid, {name}7, %zero : tensor<64xi1>, {column} loc(#loc)
    {name}9 = tt.expand_dims {name}8 {{axis = 0 : i32}} : {column} -> tensor<1x64xi32, {layout}> loc(#loc)
    {name}10 = tt.broadcast {name}9 : tensor<1x64xi32, {layout}> -> tensor<64x64xi32, {layout}> loc(#loc)
    {name} = tt.addptr {name}6, {name}10 : {tile}, tensor<64x64xi32, {layout}> loc(#loc)
"""


def store(layout: str) -> Access:
    body = address(layout, "%s_ptr") + f"    tt.store %p, %value : tensor<64x64x!tt.ptr<bf16>, {layout}> loc(#loc)"
    (found,) = ttgir.accesses(kernel(body))
    return found


def test_a_store_of_sixteen_bytes_a_lane() -> None:
    assert store("#rows") == Access("store", "s_ptr", (64, 64), 16, 16, 128, False, False, 32, 1, 1)


def test_a_store_of_two_bytes_a_lane() -> None:
    found = store("#scalars")
    assert (found.vector_bytes, found.run_bytes, found.contiguous, found.fastest) == (2, 64, 1, 1)


def test_a_warp_that_runs_along_the_strided_side() -> None:
    """Two bytes to each of 32 rows: the layout treats rows as contiguous, but in the addresses columns are."""
    found = store("#strided")
    assert (found.vector_bytes, found.run_bytes, found.contiguous, found.fastest) == (2, 2, 1, 0)


@pytest.mark.parametrize(("layout", "vector", "run"), [("#mma", 4, 16), ("#fma", 8, 16), ("#bits", 8, 16)])
def test_accumulators_stored_as_they_lie(layout: str, vector: int, run: int) -> None:
    found = store(layout)
    assert (found.vector_bytes, found.run_bytes) == (vector, run)


def test_a_stride_that_is_no_constant_leaves_the_side_open() -> None:
    body = address("#rows").replace("arith.select %valid, %p7, %zero", "arith.muli %p7, %p1")
    (found,) = ttgir.accesses(kernel(body + "    %x = tt.load %p : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)"))
    assert found.contiguous is None and found.fastest == 1


LOOP = """
    %r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %cst, %at = %p) -> (tensor<64x64xf32, #mma>, tensor<64x64x!tt.ptr<bf16>, #rows>)  : i32 {{
{load}
      %b = ttg.local_alloc : () -> !ttg.memdesc<64x64xbf16, #shared, #smem, mutable> loc(#loc)
      %sum = ttng.warp_group_dot {a}, %b, %acc {{inputPrecision = 0 : i32}} : !ttg.memdesc<64x64xbf16, #shared, #smem> * !ttg.memdesc<64x64xbf16, #shared, #smem> -> tensor<64x64xf32, #mma> loc(#loc)
      %next = tt.addptr %at, %step : tensor<64x64x!tt.ptr<bf16>, #rows>, tensor<64x64xi32, #rows> loc(#loc)
      scf.yield %sum, %next : tensor<64x64xf32, #mma>, tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)
    }} loc(#loc)
"""  # noqa: E501


def test_an_operand_that_is_loaded_by_hand_in_the_loop() -> None:
    load = """
      %x = tt.load %at, %mask : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)
      %y = arith.mulf %x, %x : tensor<64x64xbf16, #rows> loc(#loc)
      %m = ttg.local_alloc %y : (tensor<64x64xbf16, #rows>) -> !ttg.memdesc<64x64xbf16, #shared, #smem> loc(#loc)"""
    (found,) = ttgir.accesses(kernel(address("#rows") + LOOP.format(load=load, a="%m")))
    assert found == Access("load", "a_ptr", (64, 64), 16, 16, 128, True, True, 32, 1, 1)


def test_an_operand_that_is_copied_in_the_background() -> None:
    before = "    %m = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable> loc(#loc)"
    load = """
      %to = ttg.memdesc_index %m[%i] : !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x64xbf16, #shared, #smem, mutable> loc(#loc)
      %t = ttg.async_copy_global_to_local %at, %to mask %k other %o {contiguity = 4 : i32} : tensor<64x64x!tt.ptr<bf16>, #rows> -> <64x64xbf16, #shared, #smem, mutable> loc(#loc)
      %from = ttg.memdesc_index %m[%j] : !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x64xbf16, #shared, #smem, mutable> loc(#loc)"""  # noqa: E501
    (found,) = ttgir.accesses(kernel(address("#rows") + before + LOOP.format(load=load, a="%from")))
    # The known contiguity of the addresses limits the copy's width; the layout would allow more.
    assert found == Access("async", "a_ptr", (64, 64), 16, 8, 128, True, True, 32, 1, 1)


def test_an_index_or_a_mask_is_no_operand() -> None:
    load = """
      %ids = tt.load %at : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)
      %ptrs = tt.addptr %p, %ids : tensor<64x64x!tt.ptr<bf16>, #rows>, tensor<64x64xi32, #rows> loc(#loc)
      %x = tt.load %ptrs : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)
      %y = arith.select %ids, %x, %x : tensor<64x64xi1, #rows>, tensor<64x64xbf16, #rows> loc(#loc)"""
    first, second = ttgir.accesses(kernel(address("#rows") + LOOP.format(load=load, a="%y")))
    assert (first.feeds_dot, second.feeds_dot) == (False, True)
    assert (first.contiguous, second.contiguous) == (1, None)


def test_an_address_out_of_two_arguments_has_none() -> None:
    body = "    %one = arith.select %flag, %a_ptr, %s_ptr : !tt.ptr<bf16> loc(#loc)" + address("#rows", "%one")
    body += "    %x = tt.load %p : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)"
    assert [x.argument for x in ttgir.accesses(kernel(body))] == [None]
    assert [x.argument for x in ttgir.accesses(kernel(body.replace("%s_ptr : ", "%a_ptr : ")))] == ["a_ptr"]


def test_names_of_two_regions_do_not_mix() -> None:
    """Two branches of the text use the same names."""
    branch = (
        "      %q = tt.addptr {base}, %i : !tt.ptr<bf16>, i32 loc(#loc)\n      scf.yield %q : !tt.ptr<bf16> loc(#loc)\n"
    )
    body = "    %0 = scf.if %flag -> (!tt.ptr<bf16>) {\n" + branch.format(base="%a_ptr")
    body += "    } else {\n" + branch.format(base="%a_ptr") + "    } loc(#loc)\n"
    body += "    scf.if %flag {\n" + branch.format(base="%s_ptr") + "    } loc(#loc)\n" + address("#rows", "%0")
    body += "    %x = tt.load %p : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)"
    assert [x.argument for x in ttgir.accesses(kernel(body))] == ["a_ptr"]


def test_values_that_go_through_a_while_loop() -> None:
    body = """
    %w:2 = scf.while (%u = %p, %v = %c0) : (tensor<64x64x!tt.ptr<bf16>, #rows>, i32) -> (tensor<64x64x!tt.ptr<bf16>, #rows>, i32) {
      scf.condition(%go) %u, %v : tensor<64x64x!tt.ptr<bf16>, #rows>, i32 loc(#loc)
    } do {
    ^bb0(%u: tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc), %v: i32 loc(#loc)):
      %x = tt.load %u : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)
      scf.yield %u, %v : tensor<64x64x!tt.ptr<bf16>, #rows>, i32 loc(#loc)
    } loc(#loc)
    %y = tt.load %w#0 : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc)"""  # noqa: E501
    inside, after = ttgir.accesses(kernel(address("#rows") + body))
    assert (inside.argument, inside.in_loop, inside.contiguous) == ("a_ptr", True, 1)
    assert (after.argument, after.in_loop) == ("a_ptr", False)


@pytest.mark.parametrize("tile", ["128x64xbf16, #shared", "tensor<128x64xbf16, #shared>"])
def test_a_load_by_descriptor(tile: str) -> None:
    body = f"""
    %m = ttg.local_alloc : () -> !ttg.memdesc<128x64xbf16, #shared, #smem, mutable> loc(#loc)
    ttng.async_tma_copy_global_to_local %a_desc[%i, %j] %m, %bar, %t : !tt.tensordesc<{tile}>, !ttg.memdesc<1xi64, #s, #smem> -> !ttg.memdesc<128x64xbf16, #shared, #smem, mutable> loc(#loc)
    %s = ttng.warp_group_dot %m, %m, %c : !ttg.memdesc<128x64xbf16, #shared, #smem> * !ttg.memdesc<128x64xbf16, #shared, #smem> -> tensor<64x64xf32, #mma> loc(#loc)
    ttng.async_tma_copy_local_to_global %a_desc[%i, %j] %m : !tt.tensordesc<{tile}>, !ttg.memdesc<128x64xbf16, #shared, #smem> loc(#loc)"""  # noqa: E501
    load, store = ttgir.accesses(kernel(body, f"%a_desc: !tt.tensordesc<{tile}>"))
    assert load == Access("tma", "a_desc", (128, 64), 16, 16, 128, False, True, 64, 1, 1)
    assert store.argument == "a_desc"


MMA = "    ttng.tc_gen5_mma %a, %b, {d}, {use}, %true : !ttg.memdesc<128x64xbf16, #shared, #smem>, !ttg.memdesc<64x32xbf16, #shared, #smem>, !ttg.memdesc<128x32xf32, #tmem, #ttng.tensor_memory, mutable> loc(#loc)"  # noqa: E501
READ = "    %r = ttng.tmem_load %d : !ttg.memdesc<128x32xf32, #tmem> -> tensor<128x32xf32, #rows> loc(#loc)"


@pytest.mark.parametrize(
    ("between", "second", "use", "chained"),
    [("", "%d", "%true", True), ("", "%e", "%true", False), ("", "%d", "%no", False), (READ, "%d", "%true", False)],
)
def test_products_chained_into_one_accumulator(between: str, second: str, use: str, chained: bool) -> None:
    first = MMA.format(d="%d", use="%true")
    body = "\n".join(["    %no = arith.constant false loc(#loc)", first, between, MMA.format(d=second, use=use)])
    assert ttgir.chained(kernel(body)) is chained
    assert [x[:3] for x in ttgir.products(kernel(first))] == [((128, 32, 64), 16, False)]


def test_the_assemblers_log() -> None:
    log = """ptxas-blackwell info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
due to non wgmma instructions defining accumulator registers in the function 'pairwise_kernel' in line 1117
ptxas-blackwell info    : Used 126 registers, used 1 barriers"""
    (found,) = binary.serialised(log)
    assert "C7515" in found
    assert binary.serialised("ptxas info    : Used 126 registers") == ()


def test_what_ptx_loads_stores_and_multiplies() -> None:
    ptx = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 st.global.b16 [ %rd1 + 0 ], { %rs1 };
    st.global.b16 [ %rd2 ], { %rs1 };
    ld.global.nc.b32 { %r1 }, [ %rd1 ];
    ld.param.b64 %rd1, [kernel_param_0];
    @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, %r2;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, %p1, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1,%r2}, {%r5,%r6,%r7,%r8}, %rd2, %p1, 1, 1, 0;
    """
    assert binary._widths(ptx, "cuda") == {"ld.v4.b32": 1, "st.b16": 2, "ld.b32": 1}
    assert binary._copies(ptx) == {16: 1, 4: 1}
    assert binary._wgmma(ptx) == (("m64n128k16", 2, 1),)
    amd = "\tglobal_load_dwordx4 v[0:3], v[4:5], off\n\tbuffer_store_short v1, v2, s[0:3], 0 offen\n"
    assert binary._widths(amd, "hip") == {"ld.dwordx4": 1, "st.short": 1}


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "code", "programs"),
    [
        (126, 8, 47_104, 90, 2),
        (129, 8, 47_104, 90, 1),
        (98, 8, 47_104, 90, 2),
        (154, 4, 47_104, 90, 3),
        (78, 8, 47_104, 90, 3),
        (104, 2, 0, 90, 8),
        (32, 4, 100_000, 90, 2),
        (32, 4, 100_000, 80, 1),
        (16, 1, 0, 90, 32),
        (32, 4, 232_448, 90, 1),
        (128, 4, 20_000, "gfx942", 3),
        (256, 8, 20_000, "gfx942", 1),
    ],
)
def test_programs_that_fit_a_multiprocessor(
    registers: int, warps: int, shared: int, code: int | str, programs: int
) -> None:
    assert binary.programs_per_sm(registers, warps, shared, code) == programs


@pytest.mark.parametrize(
    ("tile", "warps", "columns", "share"),
    [
        ((128, 64), 8, 64, 0.57),
        ((128, 128), 8, 128, 0.80),
        ((128, 256), 8, 256, 1.0),
        ((64, 64), 8, 32, 0.40),
        ((64, 64), 4, 64, 0.50),
    ],
)
def test_the_share_of_the_peak_that_a_tile_allows(
    tile: tuple[int, int], warps: int, columns: int, share: float
) -> None:
    """A step of 16 channels of bfloat16: one wgmma a warp group, and the operands copied in for the next."""
    text = f"/*0000*/ HGMMA.64x{columns}x16.F32.BF16 R24, gdesc[UR8], R24 ;"
    copied = Access("tma", "a", (sum(tile), 16), 16, 16, 32, True, True, 1)
    loop = binary.work(sass.parse(text)[""], 90, warps, [copied])
    facts = Facts(wgmma=((f"m64n{columns}k16", 1, 0),), programs_per_sm=1, loop_work=loop)
    found = binary.predicted_share(facts, "sm_90", 64)
    assert found == pytest.approx(share, abs=0.005)


def test_the_share_counts_the_epilogue_and_what_runs_under_it() -> None:
    loop = Work(ideal=100, tensor=100, shared=80, issue=30)
    facts = Facts(wgmma=(("m64n128k16", 4, 0),), programs_per_sm=1, loop_work=loop,
                  rest_work=Work(exponential=200, issue=300))  # fmt: skip
    assert binary.predicted_share(facts, "sm_90", 10) == pytest.approx(1000 / 1500)
    assert binary.predicted_share(replace(facts, programs_per_sm=2), "sm_90", 10) == 1.0
    assert binary.predicted_share(replace(facts, serialised=("C7515",)), "sm_90", 10) == pytest.approx(1000 / 1800)
    assert binary.predicted_share(Facts(), "sm_90", 10) is None
    assert binary.predicted_share(facts, "gfx942", 10) is None


def test_what_a_wgmma_reads_from_shared_memory() -> None:
    shared, registers = (
        binary.work(sass.parse(f"/*0000*/ HGMMA.64x128x16.F32.BF16 R24, {a}gdesc[UR8], R24 ;")[""], 90, 4)
        for a in ("", "R120, ")
    )
    assert (shared.tensor, shared.shared, registers.tensor, registers.shared) == (64, 48, 64, 32)


def test_a_wider_operand_takes_twice_the_cycles_of_mma_sync() -> None:
    half, tf32 = (
        binary.work(sass.parse(f"/*0000*/ HMMA.{kind} R4, R8, R12, R4 ;")[""], 80, 4).tensor
        for kind in ("16816.F32.BF16", "1688.F32.TF32")
    )
    assert (half, tf32) == (8.0, 8.0)


PROGRAM = """
import contextlib, dataclasses, io, json, os, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gssf_triton.autotune.binary import inspect, predicted_share


@triton.jit
def product(a_ptr, b_ptr, s_ptr, D, stride, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    s = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, D, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * stride + k + rows[None, :])
        b = tl.load(b_ptr + rows[None, :] * stride + k + rows[:, None])
        s = tl.dot(a, b, s)
    tl.store(s_ptr + rows[:, None] * stride + rows[None, :], s.to(tl.bfloat16))


names = ("a_ptr", "b_ptr", "s_ptr", "D", "stride")
signature = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in names} | {"BLOCK": "constexpr"}
attrs = {(i,): [["tt.divisibility", 16]] for i in range(5)}
source = ASTSource(fn=product, signature=signature, constexprs={"BLOCK": 64}, attrs=attrs)
found = {}
for backend, code, warp in (("cuda", 90, 32), ("hip", "gfx942", 64)):
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        k = triton.compile(source, target=GPUTarget(backend, code, warp), options={"num_warps": 4, "num_stages": 3})
    facts = inspect(k.asm, backend=backend, code=code, num_warps=4, shared=k.metadata.shared, log=log.getvalue())
    share = predicted_share(facts, f"sm_{code}", 16)
    found[backend] = dataclasses.asdict(facts) | {"share": share}
json.dump(found, sys.stdout)
"""


@pytest.mark.kernels
def test_a_real_compilation(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    run = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    hopper, amd = (json.loads(run.stdout)[backend] for backend in ("cuda", "hip"))

    assert 32 <= hopper["registers"] <= 128 and hopper["spills"] == 0 and hopper["shared"] >= 3 * 64 * 64 * 2
    assert hopper["wgmma"] == [["m64n64k16", 4, 0]] and hopper["tensor_ops"] == 4
    assert hopper["ptx_widths"] == {"st.v4.b32": 4} and set(hopper["cp_async"]) == {"16"}
    assert hopper["serialised"] == hopper["hazards"] == []
    assert hopper["loop"]["tensor"] == 4 and hopper["loop_instructions"] < hopper["instructions"]
    assert hopper["programs_per_sm"] >= 4 and 0.3 < hopper["share"] <= 0.5
    looped = [x for x in hopper["accesses"] if x["in_loop"]]
    assert {(x["argument"], x["kind"], x["vector_bytes"], x["feeds_dot"], x["contiguous"]) for x in looped} == {
        ("a_ptr", "async", 16, True, 1),
        ("b_ptr", "async", 16, True, 0),
    }
    assert [(x["argument"], x["vector_bytes"]) for x in hopper["accesses"] if x["kind"] == "store"] == [("s_ptr", 16)]

    assert amd["registers"] > 0 and amd["spills"] == 0 and amd["tensor_ops"] > 0 and amd["share"] is None
    assert {x["argument"] for x in amd["accesses"]} == {"a_ptr", "b_ptr", "s_ptr"}
