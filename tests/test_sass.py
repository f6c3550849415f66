"""Machine code read as text: what instructions write, where loops are, and what a wgmma may still be using."""

from __future__ import annotations

import random

import pytest

from gssf_triton.autotune import sass

SUMS = "HGMMA.64x64x16.F32.BF16 R24, {a}, gdesc[UR8], R24{close}"


def code(*lines: str) -> list[sass.Instruction]:
    """Instructions 16 bytes apart, as `cuobjdump -sass` prints them."""
    text = "".join(f"        /*{16 * i:04x}*/        {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    (instructions,) = sass.parse(text).values()
    assert len(instructions) == len(lines)
    return instructions


def wgmma(a: int | str, close: bool = True) -> str:
    """A product with A in four registers from R`a`, or in shared memory; `close` ends the group."""
    return SUMS.format(a=f"R{a}" if isinstance(a, int) else a, close=", gsb0" if close else "")


WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDS.128 R8, [R42]", range(8, 12)),
        ("LDG.E.64 R6, desc[UR4][R2.64]", range(6, 8)),
        ("LDG.E.U16 R6, desc[UR4][R2.64]", range(6, 7)),
        ("LDSM.16.M88.4 R88, [R146+UR8+0xc000]", range(88, 92)),
        ("LDSM.16.M88 R88, [R146]", range(88, 89)),
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8], R24", range(24, 88)),
        ("HGMMA.64x16x8.F32.TF32 R24, R72, gdesc[UR16], RZ, !UPT", range(24, 32)),
        ("HGMMA.64x64x16.F16 R24, gdesc[UR16], R24, gsb0", range(24, 40)),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", range(4, 8)),
        ("IMAD.WIDE R10, R6, UR4, RZ", range(10, 12)),
        ("IMAD.WIDE.U32 R10, P1, R6, R4, RZ", range(10, 12)),
        ("CS2R R42, SRZ", range(42, 44)),
        ("SHFL.BFLY PT, R3, R54, 0x2, 0x1f", range(3, 4)),
        ("LOP3.LUT P0, R5, R4, 0xf, RZ, 0xc0, !PT", range(5, 6)),
        ("F2F.F64.F32 R4, R8", range(4, 6)),
        ("SHF.L.U64.HI R4, R8, 0x1, R9", range(4, 5)),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", range(0)),
        ("STG.E.128 desc[UR4][R2.64], R4", range(0)),
        ("STS.128 [R4], R8", range(0)),
        ("R2UR UR4, R5", range(0)),
        ("LDGSTS.E.BYPASS.128 [R101], desc[UR20][R8.64], !P1", range(0)),
        ("BRA 0x0", range(0)),
        ("NEWOP.128 R4, R8", range(4, 8)),
    ],
)
def test_what_an_instruction_writes(line: str, registers: range) -> None:
    assert sass.writes(code(line)[0]) == registers


def test_a_loop_that_waits_before_it_writes_is_clean() -> None:
    loop = code("MOV R120, R4", wgmma(120), WAIT, "LDS.128 R120, [R2]", "@P0 BRA 0x10", "STG.E [R2], R24", "EXIT")
    assert sass.hazards(loop) == ()


def test_a_write_at_the_top_of_a_loop_while_the_bottom_still_reads() -> None:
    """The order of the text shows no fault; only the loop's back edge does."""
    loop = code("MOV R4, R5", "LDS.128 R120, [R2]", WAIT, wgmma(120), "@P0 BRA 0x10", WAIT, "EXIT")
    (found,) = sass.hazards(loop)
    assert found.startswith("0x10 LDS.128 R120, [R2] touches R120, R121, R122, R123, which the HGMMA at 0x30 may still")


def test_a_wait_that_leaves_the_group_it_should_cover() -> None:
    assert sass.hazards(code(wgmma(120), WAIT_BUT_ONE, "MOV R121, R4", WAIT, "EXIT"))


def test_a_wait_that_leaves_a_younger_group_alone() -> None:
    two = (wgmma(120), wgmma(124), WAIT_BUT_ONE)
    assert sass.hazards(code(*two, "MOV R121, R4", WAIT, "EXIT")) == ()
    assert sass.hazards(code(*two, "MOV R125, R4", WAIT, "EXIT"))


def test_products_of_one_group_are_waited_for_together() -> None:
    group = (wgmma(120, close=False), wgmma(124))
    assert sass.hazards(code(*group, WAIT, "MOV R120, R4", "MOV R124, R4", "EXIT")) == ()
    # The group is not closed before the wait, so the wait does not cover it.
    assert sass.hazards(code(wgmma(120, close=False), WAIT, "MOV R120, R4", "EXIT"))


def test_a_wide_write_that_begins_below_the_operand() -> None:
    assert sass.hazards(code(wgmma(120), "LDS.128 R118, [R2]", WAIT, "EXIT"))
    assert sass.hazards(code(wgmma(120), "LDS.64 R118, [R2]", WAIT, "EXIT")) == ()


def test_a_branch_around_the_wait_and_a_predicated_write() -> None:
    assert sass.hazards(code(wgmma(120), "@P0 BRA 0x30", WAIT, "MOV R120, R4", "EXIT"))
    assert sass.hazards(code(wgmma(120), "@P0 MOV R120, R4", WAIT, "EXIT"))
    assert sass.hazards(code(wgmma(120), f"@P0 {WAIT}", "MOV R120, R4", "EXIT"))
    # Nothing runs directly after an unconditional jump.
    assert sass.hazards(code(wgmma(120), "BRA 0x30", "MOV R120, R4", WAIT, "EXIT")) == ()


def test_writes_in_a_function_called_and_after_it_returns() -> None:
    called = ("EXIT", "MOV R120, R4", "RET.REL.NODEC R2 0x0")
    assert sass.hazards(code(wgmma(120), "CALL.REL.NOINC 0x40", WAIT, *called))
    assert sass.hazards(code(wgmma(120), WAIT, "CALL.REL.NOINC 0x40", *called)) == ()


def test_a_reconvergence_point_goes_on_behind_its_own_region() -> None:
    region = ("BSSY B0, 0x40", "@P0 BRA 0x30", WAIT, "BSYNC B0")
    assert sass.hazards(code(*region, wgmma(120), WAIT, "MOV R120, R4", "EXIT")) == ()
    around = ("BSSY B0, 0x50", "@P0 BRA 0x40", WAIT, "BSYNC B0")
    assert sass.hazards(code(wgmma(120), *around, "MOV R120, R4", "EXIT"))


@pytest.mark.parametrize("early", ["STG.E [R2], R24", "FADD R4, R30, R5", "MOV R25, RZ", wgmma(28)])
def test_an_accumulator_is_left_alone_until_the_wait(early: str) -> None:
    assert sass.hazards(code(wgmma("gdesc[UR4]"), early, WAIT, "EXIT"))
    assert sass.hazards(code(wgmma("gdesc[UR4]"), WAIT, early, WAIT, "EXIT")) == ()


def test_a_product_may_add_to_the_accumulator_of_the_one_before() -> None:
    assert sass.hazards(code(wgmma(120, close=False), wgmma(124), wgmma("gdesc[UR4]"), WAIT, "EXIT")) == ()


def _unrolled(lines: list[str], start: int, rounds: int) -> set[tuple[int, int, int]]:
    """(writer, register, reader) of a loop from `start` to the end, simulated step by step."""
    pending: list[tuple[int, int, int]] = []  # (register, reader, groups closed after it)
    found = set()
    for at in [*range(start), *list(range(start, len(lines))) * rounds]:
        x = code(lines[at])[0]
        found |= {(at, r, reader) for r in sass.writes(x) for register, reader, _ in pending if register == r}
        if x.opcode == "HGMMA":
            pending += [(r, at, -1) for r in sass.operand_registers(x)]
            if "gsb0" in x.operands:
                pending = [(r, reader, age + 1) for r, reader, age in pending]
        elif x.opcode == "WARPGROUP":
            pending = [p for p in pending if p[2] < int(x.operands[1], 16)]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_hazard_of_a_random_loop_is_missed(seed: int) -> None:
    rng = random.Random(seed)
    pick = [lambda: wgmma(120 + 4 * rng.randrange(2), rng.random() < 0.7), lambda: WAIT, lambda: WAIT_BUT_ONE,
            lambda: f"MOV R{120 + rng.randrange(8)}, R4"]  # fmt: skip
    lines = [rng.choice(pick)() for _ in range(10)]
    expected = {(at, reader) for at, _, reader in _unrolled(lines, 3, 3)}
    reported = sass.hazards(code(*lines, "@P0 BRA 0x30", WAIT, "EXIT"))
    # If two products read one register, the report names the younger, which is waited for last.
    assert {int(x.split()[0], 16) // 16 for x in reported if "may still read" in x} == {at for at, _ in expected}


NEST = (
    "MOV R0, R1",
    "MOV R2, R3",
    wgmma("gdesc[UR4]"),
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3",
    "@!P1 BRA 0x30",
    WAIT,
    "@P0 BRA 0x20",
    "MUFU.EX2 R4, R5",
    "@P2 BRA 0x70",
    "@P3 BRA 0x10",
    "EXIT",
    "BRA 0xb0",
)


def test_loops_are_found_inside_one_another() -> None:
    graph = sass.blocks(code(*NEST))
    sizes = sorted(sum(len(graph[i].instructions) for i in loop) for loop in sass.loops(graph))
    assert sizes == [2, 2, 5, 9]  # the trap after the exit is unreachable


def test_the_hot_loop_has_the_products_and_the_spin_within_it() -> None:
    hot = sass.hot_loop(code(*NEST))
    assert [hot[0].address, hot[-1].address] == [0x20, 0x60]
    assert sass.mix(hot) == {"tensor": 1, "wait": 2, "control": 2}
    assert sass.hot_loop(code("MOV R0, R1", "EXIT")) == []


def test_labels_and_addresses_say_the_same() -> None:
    """`nvdisasm -c` jumps to labels, `cuobjdump -sass` to addresses."""
    text = """
.text.kernel:
        /*0000*/                   MOV R0, R1 ;
.L_x_1:
        /*0010*/              @P0 BRA `(.L_x_0) ;
        /*0020*/                   BRA `(.L_x_1);
.L_x_0:
        /*0030*/                   EXIT ;
"""
    assert sass.parse(text) == {"kernel": code("MOV R0, R1", "@P0 BRA 0x0030", "BRA 0x0010", "EXIT")}


def test_fillers_that_never_run_count_as_waiting() -> None:
    filler, load = code("@!PT LDS RZ, [RZ]", "LDS.64 R4, [R2]")
    assert sass.mix([filler, load]) == {"wait": 1, "shared": 1}
    assert (sass.lane_bytes(filler), sass.lane_bytes(load)) == (0, 8)
