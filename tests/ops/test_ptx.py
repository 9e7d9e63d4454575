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
from ptx_races import Race

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


def run(body: str, tensor: torch.Tensor, *, programs: int = 1, warps: int = 1) -> torch.Tensor:
    Kernel(HEAD + body + TAIL).run((programs,), [tensor], warps, 512 * warps)
    return tensor


def numbers(count: int = 128) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_copies_arrive_when_they_are_waited_for():
    expected = numbers()
    expected[::4] += 1
    assert torch.equal(run(COPY + WAIT + ADD, numbers()), expected)
    with pytest.raises(ValueError, match="read before it is written"):
        run(COPY + ADD, numbers())
    with pytest.raises(Race, match="reads what a copy is under way to"):
        run(COPY + WAIT + COPY + ADD, numbers())


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


OWN = "\tst.shared.b32 [%r2], %r1;\n"
OTHERS = "\txor.b32 %r5, %r2, 512;\n\tld.shared.b32 %r6, [%r5];\n\tst.global.b32 [%rd3], %r6;\n"
BARRIER = "\tbar.sync 0;\n"
SECOND = "\tsetp.ge.u32 %p1, %r1, 32;\n"
CHANGED = "\tmov.b32 %r3, 7;\n\t@%p1 st.shared.b32 [%r2], %r3;\n"


def test_warps_wait_for_each_other():
    expected = numbers(256)
    expected[::4] = torch.arange(64) ^ 32
    assert run(OWN + BARRIER + OTHERS, numbers(256), warps=2).equal(expected)
    assert not run(OWN + BARRIER + OTHERS + SECOND + BARRIER + CHANGED, numbers(256), warps=2).equal(numbers(256))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # The second warp's bytes, after the first has read them; in the first's, while the second still reads.
        (OTHERS + SECOND + CHANGED, "1 writes what another reads"),
        (OTHERS + CHANGED.replace("@%p1 ", ""), "1 reads what another writes"),
        (OTHERS + SECOND + "\t@%p1 " + COPY.lstrip(), "1 writes what another reads"),
        (OTHERS + COPY, "1 reads what a copy is under way to"),
        ("\tshr.u32 %r5, %r1, 5;\n\tst.shared.b32 [global_smem], %r5;\n", "1 writes what another writes"),
        ("\tst.shared.b32 [global_smem], %r1;\n", "lanes write different bytes"),
        (COPY + OWN, "0 writes what a copy is under way to"),
        (COPY + COPY, "0 copies to what a copy is under way to"),
    ],
)
def test_warps_that_do_not_wait_fail(body, message):
    with pytest.raises(Race, match=message):
        run(OWN + BARRIER + body, numbers(256), warps=2)


def test_programs_do_not_wait_for_each_other():
    write = "\tmov.b32 %r7, %ctaid.x;\n\tst.global.b32 [%rd1], %r7;\n"
    assert run(write, numbers()).equal(numbers())
    with pytest.raises(Race, match="1 writes what another writes"):
        run(write, numbers(), programs=2)
    with pytest.raises(Race, match="1 reads what another writes"):
        run(
            "\tld.global.b32 %r6, [%rd3];\n\tadd.s32 %r6, %r6, 1;\n\tst.global.b32 [%rd3], %r6;\n",
            numbers(),
            programs=2,
        )


# Layers of one stretch of tokens or several, all tiers, windows; some of the shapes, for each takes half a minute to
# compile and to run. Prefill's products are Ampere's, since Hopper's are no instructions of one warp.
@pytest.mark.parametrize(
    ("architecture", "chosen"),
    [
        (
            "90",
            (
                "test_fused_integer.py::test_errs_no_more_than_its_twin[all-tiers]",
                "test_fused_integer.py::test_errs_no_more_than_its_twin[a-tier-each]",
                "test_fused_integer.py::test_errs_no_more_than_its_twin[j2]",
                "test_fused_integer.py::test_windows_and_soft_caps[16-0.5]",
                "test_fused_integer.py::test_bfloat16[d128]",
            ),
        ),
        (
            "90",
            (
                "test_fused_decode.py::test_decode_errs_no_more_than_its_twin[uneven-ranks]",
                "test_fused_decode.py::test_decode_errs_no_more_than_its_twin[j2-heads7-d64]",
                "test_fused_decode.py::test_decode_errs_no_more_than_its_twin[all-tiers]",
                "test_fused_decode.py::test_long_contexts[80]",
                "test_fused_decode.py::test_tokens_of_no_request_get_the_mean[3-False]",
                "test_store.py::test_what_is_not_a_number_shows[32767-triton]",
            ),
        ),
        (
            "80",
            (
                "test_fused_prefill.py::test_prefill_errs_no_more_than_its_twin[j2-heads7-d64]",
                "test_fused_prefill.py::test_windows_and_soft_caps_over_16_bits[170-0.0-2-dtype1]",
            ),
        ),
        (
            "80",
            (
                "test_fused_expand.py::test_errs_no_more_than_the_twin[tiers-j2]",
                "test_store.py::test_writes_what_the_twin_does[all-tiers-triton]",
                "test_store.py::test_writes_what_the_twin_does[folded-down-triton]",
            ),
        ),
    ],
    ids=["integer", "decode", "prefill", "expand-and-store"],
)
def test_compiled_kernels_do_what_interpreted_ones_do(architecture, chosen, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "MKV_RUN_PTX": architecture, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *(f"{HERE}/{test}" for test in chosen)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert f"{len(chosen)} passed" in ran.stdout and " skipped" not in ran.stdout and "failed" not in ran.stdout
