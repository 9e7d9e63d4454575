# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels, their PTX run on the CPU; and that what runs it sees what a GPU would let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from ptx import Kernel

HERE = Path(__file__).parent
HEAD = """
.visible .entry k(.param .u64 k_param_0)
{
\t.reg .b32 \t%r<9>;
\tld.param.b64 \t%rd1, [k_param_0];
\tmov.u32 \t%r1, %tid.x;
\tmul.wide.s32 \t%rd2, %r1, 16;
\tadd.s64 \t%rd3, %rd1, %rd2;
\tshl.b32 \t%r2, %r1, 4;
"""
COPY = "\tcp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;\n"
WAIT = "\tcp.async.commit_group;\n\tcp.async.wait_group 0;\n"
ADD = "\tld.shared.b32 %r3, [%r2];\n\tadd.s32 %r4, %r3, 1;\n\tst.global.b32 [%rd3], %r4;\n"
TAIL = "\tret;\n}\n"


def run(body: str, tensor: torch.Tensor, **options: bool) -> torch.Tensor:
    Kernel(HEAD + body + TAIL).run((1,), [tensor], 1, 512, **options)
    return tensor


def numbers(count: int = 128) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_copies_arrive_when_they_are_waited_for():
    expected = numbers()
    expected[::4] += 1
    assert torch.equal(run(COPY + WAIT + ADD, numbers()), expected)
    assert torch.equal(run(COPY + ADD, numbers(), eager=True), expected)
    with pytest.raises(ValueError, match="read before it is written"):
        run(COPY + ADD, numbers())


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("\tst.global.b32 [%rd3+2], %r1;\n", IndexError, "not aligned"),
        ("\tst.global.b32 [%rd3+16], %r1;\n", IndexError, "of a tensor of 512 bytes"),
        ("\tst.global.b32 [%rd3-4096], %r1;\n", IndexError, "no tensor|of a tensor"),
        ("\tst.global.b32 [%rd3], %r5;\n", ValueError, "%r5 is read before it is written"),
        ("\tsetp.lt.s32 %p1, %r1, 5;\n\t@%p1 bra $L__BB0_1;\n$L__BB0_1:\n", ValueError, "lanes part ways"),
        ("\tsin.approx.f32 %r5, %r1;\n", NotImplementedError, "sin"),
    ],
)
def test_what_a_gpu_may_let_pass_fails(body, error, message):
    with pytest.raises(error, match=message):
        run(body, numbers())


# Layers of one stretch of tokens or several, all tiers, windows; copies at once for a few. Prefill's products are
# Ampere's, since Hopper's are no instructions of one warp.
@pytest.mark.parametrize(
    ("chosen", "variables"),
    [
        ("test_fused_integer.py::test_errs_no_more_than_its_twin", {}),
        ("test_fused_integer.py::test_windows_and_soft_caps", {}),
        ("test_fused_integer.py::test_errs_no_more_than_its_twin[all-tiers]", {"MKV_EAGER_COPIES": "1"}),
        ("test_fused_integer.py::test_bfloat16[d128]", {}),
        ("test_fused_decode.py::test_decode_errs_no_more_than_its_twin", {}),
        ("test_fused_decode.py::test_long_contexts[80]", {}),
        ("test_fused_prefill.py::test_prefill_errs_no_more_than_its_twin[j2-heads7-d64]", {"MKV_RUN_PTX": "80"}),
        ("test_fused_prefill.py::test_windows_and_soft_caps_over_16_bits[170-0.0-2-dtype1]", {"MKV_RUN_PTX": "80"}),
        ("test_fused_expand.py::test_errs_no_more_than_the_twin[tiers-j2]", {"MKV_RUN_PTX": "80"}),
        ("test_store.py::test_writes_what_the_twin_does[all-tiers-triton]", {"MKV_RUN_PTX": "80"}),
        ("test_store.py::test_writes_what_the_twin_does[folded-down-triton]", {"MKV_RUN_PTX": "80"}),
        ("test_store.py::test_what_is_not_a_number_shows[32767-triton]", {}),
    ],
)
def test_compiled_kernels_do_what_interpreted_ones_do(chosen, variables, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "MKV_RUN_PTX": "90", "TRITON_CACHE_DIR": str(tmp_path), **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"{HERE}/{chosen}"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout and " skipped" not in ran.stdout and "failed" not in ran.stdout
