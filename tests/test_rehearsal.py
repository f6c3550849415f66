"""The stub GPU and what is recorded on it: the package's whole Python path, without a GPU and without data."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from gssf_triton.autotune.stub import stub_gpu

PROGRAM = """
import json, pickle
import torch
import gssf_triton
from gssf_triton.autotune.public_calls import loss, pairwise, ranking, search
from gssf_triton.autotune.rehearsal import recording
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.streaming.driver import stream

found = {}
for arch in ("sm_90", "gfx942"):
    with recording(arch) as tape:
        forward, backward = pairwise(8192, 8192, 32).rehearse(tape, "bf16")
        found[arch] = [[launch.kernel for launch, _ in record.launches] for record in (forward, backward)]
        found[arch + " products"] = forward.operations["matmul"] + forward.operations["bmm"]
        launch = forward.launches[0][0]
        assert pickle.loads(pickle.dumps(launch)) == launch and launch.arch == arch
with recording("sm_90") as tape:
    for call in (search(64, 1_000_000, 10), ranking(64, 1_000_000), loss("info_nce", 4096)):
        records = call.rehearse(tape, "bf16")
        found[call.name] = sorted({launch.kernel for record in records for launch, _ in record.launches})
    t = torch.empty(32_768, 1024, device="cuda", dtype=torch.float16)
    sides = [torch.empty(4, 32_768, device="cuda") for _ in "rc"]
    x = Operands(t, t, torch.empty(2, device="cuda"), *sides)
    for name, wants_slope in (("softmax_both", False), ("softmax_slope_both", True), ("sigmoid", True)):
        tape.cut()
        stream(name, x, wants_slope=wants_slope, backend="triton")
        record = tape.cut()
        found[name] = [launch.short_name for launch, _ in record.launches], sum(record.operations.values())
    x = torch.empty(16, 64, device="cuda")
    try:
        x.sum().item()
    except Exception as error:
        found["host"] = type(error).__name__
print(json.dumps(found))
"""


@pytest.mark.kernels
def test_public_calls_are_rehearsed_at_real_sizes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for arch in ("sm_90", "gfx942"):
        forward, backward = found[arch]
        assert forward.count("fold_kernel") == 2 and "gradient_kernel" in backward
        assert found[arch + " products"] == 1
    assert found["topk 64×1,000,000 k=10"] == ["fold_kernel", "topk_kernel"]
    assert found["ranks 64×1,000,000"] == ["fold_kernel", "rank_kernel"]
    assert {"stream_kernel", "fold_kernel"} <= set(found["info_nce 4,096 pairs"])
    assert found["softmax_both"] == [["stream", "merge", "merge"], 0], "S at 32,768 pairs, in one launch"
    for name, merges in (("softmax_slope_both", 0), ("sigmoid", 1)):
        launches, operations = found[name]
        # The first to be recorded asks the library whether it adds half-precision products in float32.
        assert launches == ["stream"] * 8 + ["merge"] * merges and operations <= 2 * 8 + 4, "chunks and their products"
    assert found["host"], "reading a value on the host must fail: a GPU would have to wait for it"


def test_the_disguise_ends_with_its_block() -> None:
    with stub_gpu("sm_90", backing="cpu"):
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0) and x.is_cuda and torch.cuda.is_available()
        assert torch.cuda.get_device_capability() == (9, 0)
        assert (x + 1).sum().item() == 6, "with the CPU behind it, it computes"
        assert torch.empty_like(x).is_cuda and x.new_zeros(2).is_cuda and x.to("cuda").is_cuda
    assert x.device.type == "cpu" and not x.is_cuda
    assert "device" not in vars(torch.Tensor) and "is_cuda" not in vars(torch.Tensor)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_120"])
def test_the_stub_is_known_by_its_architecture(arch: str) -> None:
    from gssf_triton.kernels.devices import identify

    with stub_gpu(arch):
        assert identify(torch.device("cuda", 0)).arch == arch
    assert identify(torch.device("cpu")).arch == "interpreter"


@pytest.mark.kernels
def test_recording_wants_kernels_that_compile() -> None:
    from gssf_triton.autotune.rehearsal import recording

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels compile here")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), recording("sm_90"):
        pass
