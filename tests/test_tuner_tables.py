"""Tables: what they may hold and whom they serve; what runs without any; and the model beside the compiler itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.store_writers import DEVICE
from support.tuner_kit import H100, a_chunk, cache, measured, pretend, stream_key  # noqa: F401

from gssf_triton.autotune import lookup, model
from gssf_triton.autotune.shapes import GPU_KERNELS, SETS, keys_for
from gssf_triton.autotune.space import DTYPES, Key
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Table, TableError, parse, render, shipped
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import PairwiseConfig
from gssf_triton.kernels.devices import Device
from gssf_triton.kernels.plans import PlanChoice
from gssf_triton.kernels.release import TRITON_RELEASE
from gssf_triton.kernels.targets import KNOWN_CARDS

TILE = Key("pairwise", "bf16", 1024, 64, 8192, 8192)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("slug", "arch", "names"), KNOWN_CARDS, ids=lambda value: value if type(value) is str else "")
def test_without_a_measurement_the_model_chooses(
    slug: str, arch: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables that once shipped held these very choices, with no time beside them."""
    card = Device(slug, names[0], arch)
    where = torch.device("cuda", 0)
    with pretend(monkeypatch, card):
        assert not lookup.entries_for(card)
        for key in keys_for(SETS["full"], GPU_KERNELS):
            expected = model.default(key, arch)
            if key.kernel == "plan" and arch == "sm_90" and TRITON_RELEASE < (3, 8):
                expected = PlanChoice("fold_product", "fewer")
            found = choice.choose(key.kernel, where, DTYPES[key.dtype], key.M, key.N, key.D, key.B, tf32=False)
            assert found == expected, key


def test_tables_serve_the_cards_they_name() -> None:
    table = Table("nvidia-h100", "sm_90", ("NVIDIA H100", "NVIDIA H200"))
    assert table.serves(H100) and table.serves(Device("x", "NVIDIA H200", "sm_90"))
    assert not table.serves(Device("x", "NVIDIA GH200 480GB", "sm_90"))
    assert not table.serves(Device("x", "NVIDIA H100 PCIe", "sm_80"))
    threads = Table("cpu-2", "cpu", ("Some CPU",))
    assert threads.serves(Device("cpu-2", "Some CPU", "cpu")) and not threads.serves(Device("cpu-4", "Some CPU", "cpu"))


def test_all_that_ships_was_measured() -> None:
    for table in shipped():
        assert table.entries and all(entry.seconds for entry in table.entries.values())


def rows_of(table: Table, change: Callable[[dict], object]) -> str:
    data = json.loads(render(table))
    change(data["entries"][0])
    return json.dumps(data)


def test_a_table_with_a_tile_too_large_for_the_target_is_refused() -> None:
    small = PairwiseConfig(64, 64, 32, num_warps=4, num_stages=2)
    table = Table("amd-mi300x", "gfx942", ("AMD Instinct MI300X",), {}, {TILE: measured(small)})
    assert parse(render(table)) == table
    with pytest.raises(TableError, match="does not fit a block of gfx942"):
        parse(rows_of(table, lambda row: row["config"].update(BLOCK_M=256, BLOCK_N=256, num_stages=4)))


def unmeasure(row: dict) -> None:
    row["source"] = "model"
    for name in ("seconds", "spread", "torch", "triton", "commit"):
        del row[name]


def test_an_entry_without_a_measurement_is_refused() -> None:
    table = Table("cpu-1", "cpu", ("a CPU",), {}, {stream_key(): a_chunk()})
    with pytest.raises(TableError, match=r"an entry must have the fields .*seconds"):
        parse(rows_of(table, unmeasure))
    with pytest.raises(TableError, match="source must be one of measured, got 'model'"):
        parse(rows_of(table, lambda row: row.update(source="model")))


def test_rows_that_only_an_earlier_version_wrote_are_left_out_of_a_users_results(tmp_path: Path) -> None:
    """Choices of the model, and a plan that is gone; what was measured beside them stays."""
    store = Store(DEVICE, tmp_path / "results.json")
    plan = Key("plan", "fp32", 256, 32, 64, 64)
    entries = {key: measured(PlanChoice("one_pass")) for key in (plan, Key("plan", "fp32", 256, 32, 64, 128))}
    store.add({stream_key(64): a_chunk(), **entries})
    assert store.path is not None
    data = json.loads(store.path.read_text("utf-8"))
    _, gone, modelled = data["entries"]
    gone["config"]["kind"] = "fold_own_product"
    unmeasure(modelled)
    store.path.write_text(json.dumps(data), "utf-8")
    assert store.read() == {stream_key(64): a_chunk()}
    assert set(store.add({stream_key(128): a_chunk()})) == {stream_key(64), stream_key(128)}
    assert len(json.loads(store.path.read_text("utf-8"))["entries"]) == 2
    assert not list(tmp_path.glob("*.broken-*"))


# The model's verdicts beside the compiler's, in a process of its own: compiling needs decorators that compile. Tiles on
# both sides of a limit, for one architecture of each kind: shared memory, registers, LDS.
COMPARE = """
import triton
from gssf_triton.autotune.compile_gate import table_cases
from gssf_triton.autotune.compiled import compile_launch
from gssf_triton.kernels.configs import PairwiseConfig
from gssf_triton.autotune.space import Key
from gssf_triton.autotune.model import tile_usage
from gssf_triton.autotune.tables import Entry, Table
from gssf_triton.kernels.targets import ARCHITECTURES

CASES = [
    ("sm_90", "bf16", 64, (128, 128, 64, 8, 4), True),
    ("sm_90", "bf16", 64, (128, 128, 64, 4, 3), False),   # spills, with Triton 3.6 just not
    ("sm_90", "bf16", 64, (128, 256, 128, 8, 3), False),  # too much shared memory
    ("sm_80", "bf16", 32, (64, 128, 64, 4, 3), True),
    ("gfx942", "bf16", 64, (64, 64, 64, 4, 3), True),
    ("gfx942", "bf16", 64, (128, 128, 64, 8, 3), False),  # too much LDS
]
for arch, numerics, B, tile, expected in CASES:
    config = PairwiseConfig(*tile)
    key = Key("pairwise" if B else "product", numerics, 1024, B, 8192, 8192)
    (made,) = table_cases(Table("x", arch, ("x",), {}, {key: Entry(config, 1.0, 0.0)}))
    real = compile_launch(made.launch).facts
    guess = tile_usage(config, B, numerics, arch)
    fits = real.shared <= ARCHITECTURES[arch].shared_bytes and not real.spills and not real.error
    case = (arch, numerics, B, tile, guess, real)
    assert fits == expected or (fits and triton.__version__.startswith("3.6.")), case
    assert guess.fits(arch) == expected, case
    assert abs(guess.shared - real.shared) <= 1024, case
"""

# What the model passes compiles, fits and spills nothing, in the heaviest variant of each kernel that keeps something
# of a tile in the tile's stead; its count of shared memory is never below the compiler's.
EPILOGUES = """
from gssf_triton.autotune import model
from gssf_triton.autotune.compile_gate import RULES, Case
from gssf_triton.autotune.compiled import compile_launch
from gssf_triton.autotune.space import Key
from gssf_triton.kernels import choice
from gssf_triton.kernels.retrieval_configs import RANKED_ROWS
from gssf_triton.autotune.public_calls import distillation, loss, region_words, search
from gssf_triton.autotune.rehearsal import recording

CASES = [
    ("sm_90", Key("stream", "fp16", 1024, 0, 8192, 8192), loss("info_nce", 8192, ids=True, label_smoothing=0.1)),
    ("sm_80", Key("stream_teacher", "fp16", 1024, 0, 8192, 8192), distillation(8192, "fp16")),
    ("sm_80", Key("ranked", "bf16", 1024, 0, *RANKED_ROWS), search(1024, 65_536, 64, 1024, mask=True)),
    ("sm_100", Key("late_interaction", "bf16", 1024, 0, 64, 32),
     region_words("late_interaction", 100, 500, 64, 32, pooling="lse-mean")),
    ("gfx942", Key("cross_attention", "bf16", 1024, 0, 64, 32),
     region_words("cross_attention_sim", 100, 500, 64, 32)),
]
KERNELS = {"stream_teacher": "stream", "ranked": "topk"}
for arch, key, call in CASES:
    # Not the model's own choice, which the gate compiles, but the one of the rest that takes most.
    rest = model.candidates(key, arch)[1:]
    config = max(rest, key=lambda c: (model.usage(c, key, arch).accumulators, model.usage(c, key, arch).shared))
    with recording(arch) as tape, choice.use(**{key.kernel: config}):
        records = call.rehearse(tape, key.dtype)
    launched = [launch for record in records for launch in record.distinct()]
    name = KERNELS.get(key.kernel, key.kernel) + "_kernel"
    launch = [launch for launch in launched if launch.kernel == name][-1]
    made = compile_launch(launch)
    # Whether its loads are wide and its products overlap is the tuner's to measure.
    case, hard = Case(launch, (1,), ""), ("compiles", "shared memory", "spills")
    assert not [rule.name for rule in RULES if rule.name in hard and rule.broken(case, made)], (launch, made.facts)
    assert made.facts.shared <= model.usage(config, key, arch).shared + model.SLACK, (launch, made.facts)
"""


@pytest.mark.kernels
def test_the_models_verdicts_are_the_compilers_and_err_on_the_safe_side() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPARE + EPILOGUES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
