# SPDX-License-Identifier: Apache-2.0
"""Compiled decode attention equals its PyTorch twin, for any widths, lengths, pages and kinds of numbers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mkv_kernels.attend import attend
from mkv_kernels.pages import view_pages
from mkv_kernels.schedule import make_buckets, split_decodes

pytest.importorskip("numba")
decode = pytest.importorskip("mkv_kernels.compiled.decode")
vector = pytest.importorskip("mkv_kernels.compiled.vector")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fixtures are on the GPU"),
    pytest.mark.skipif(decode.unsupported(torch.float32) is not None, reason="no OpenMP threads"),
]

SCALE = 0.2
LENGTHS = (1, 15, 16, 17, 63, 1000)
KINDS = {
    "float32": (torch.float32, vector.FLOAT32),
    "float16": (torch.float16, vector.FLOAT16),
    "bfloat16": (torch.bfloat16, vector.BFLOAT16),
    "bfloat16-pairs": (torch.bfloat16, vector.PAIRS),
}
RANKS = (("16x4", "16x4"), ("16x1", "16x3"), ("16x3", "16x1"))
TIERS = (
    ("16x1 8x1 4x1 2x1", "16x1 8x1 4x1 2x1"),
    ("8x4", "8x3"),
    ("4x3", "4x4"),
    ("2x4", "2x1"),
    ("16x2 2x1", "16x4"),
    ("16x3", ""),
)
SHAPES = {
    "ranks": (RANKS, {}),
    "tiers": (TIERS, {}),
    "one-query-head": (TIERS, {"M": 1}),
    "seven-query-heads": (TIERS, {"M": 7, "block_size": 32}),
    "J2": ((("16x3 8x1 4x2 2x2", "16x2 4x5"), ("4x7", "16x8")), {"J": 2, "block_size": 32}),
    "J4": ((("16x5 8x2 4x3 2x6", "16x1 2x9"), ("16x16", "16x7")), {"J": 4, "M": 1, "block_size": 64}),
    "head-96": ((("16x6", "16x5"), ("16x1 4x5", "4x3")), {"d": 96, "block_size": 48}),
    "head-128": ((("16x8", "16x8"), ("16x5 8x3", "4x8")), {"d": 128, "block_size": 128}),
    "folded": ((("16x4", "16x3"), ("4x4", "16x1 4x2")), {"fold_up": True}),
}


def run(layer, step, kind, max_queries=1):
    scores = {"window": layer.window, "soft_cap": layer.soft_cap}
    scratch = decode.DecodeScratch()
    kernel = decode.LayerDecode(layer.bases, SCALE, layer.num_heads, layer.dtype, scratch, kind=kind, **scores)
    output = torch.full((len(step.query), layer.num_heads, layer.d), float("nan"), dtype=layer.dtype)
    decodes, others = split_decodes(step.query_start_loc, step.seq_lens, step.block_table, max_queries)
    query = layer.by_run(step.query)
    if others:
        arguments = step.query_start_loc, step.seq_lens, step.block_table, layer.layout.block_size, layer.dtype
        pages = view_pages(layer.cache, layer.layout)
        buckets = make_buckets(*arguments, requests=others, window=layer.window)
        attend(query, pages, layer.bases, buckets, SCALE, output, layer.soft_cap)
    if decodes is not None:
        kernel(query, layer.cache, decodes, output)
    return output


def requires(kind):
    if kind == vector.PAIRS and decode.kind_of(torch.bfloat16) != vector.PAIRS:
        pytest.skip("the processor does not multiply bfloat16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_twin(shape, kind, make_layer):
    dtype, number = KINDS[kind]
    requires(number)
    groups, options = SHAPES[shape]
    layer = make_layer(*groups, **{"block_size": 16, "dtype": dtype, **options})
    # The longest takes 63 pages of 16 tokens, of 80.
    step = layer.step(LENGTHS, [1] * len(LENGTHS))
    layer.check(run(layer, step, number), step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("J", [1, 2])
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (5, 1.0), (16, 0.0), (100, 0.5), (1000, 0.0), (0, 1.0)])
def test_windows_and_soft_caps(window, soft_cap, J, kind, make_layer, monkeypatch):
    dtype, number = KINDS[kind]
    requires(number)
    monkeypatch.setattr(decode, "LEAST_SPLIT", 32)
    groups = ("16x1 8x1 4x1 2x1", "16x1 8x1 2x2"), ("4x4", "16x2")
    layer = make_layer(*groups, J=J, dtype=dtype, window=window, soft_cap=soft_cap)
    step = layer.step((1, 17, 130, 600, 100), (1, 3, 2, 1, 50))
    layer.check(found := run(layer, step, number, max_queries=4), step)
    if window:
        assert layer.poison_before_windows(step) or window == 1000
        assert torch.equal(run(layer, step, number, max_queries=4), found), "something before a window was read"


def test_contexts_are_split_among_threads(make_layer, monkeypatch):
    layer = make_layer(("16x4", "16x2 4x2"), block_size=32)
    step = layer.step([2000], [1])
    whole = run(layer, step, vector.FLOAT32)
    monkeypatch.setattr(decode, "TASKS_PER_THREAD", 7)
    monkeypatch.setattr(decode, "LEAST_SPLIT", 128)
    split = run(layer, step, vector.FLOAT32)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)
    layer.check(split, step)


def test_steps_of_all_kinds_of_requests(make_layer):
    """Prefills stay with PyTorch; a few queries, as of drafts, see one token more each."""
    layer = make_layer(*TIERS)
    step = layer.step((1, 40, 17, 100, 4), (1, 40, 3, 1, 4))
    layer.check(run(layer, step, vector.FLOAT32, max_queries=4), step)


def test_a_scratch_serves_layers_and_steps_of_any_size(make_layer):
    layers = [make_layer(*TIERS), make_layer(("16x1", "16x1"), M=1), make_layer(("16x8", "16x8"), d=128, M=7)]
    scratch = decode.DecodeScratch()
    for layer in (*layers, *layers):
        step = layer.step((300, 5), (1, 1))
        kernel = decode.LayerDecode(layer.bases, SCALE, layer.num_heads, layer.dtype, scratch)
        output = torch.full((2, layer.num_heads, layer.d), float("nan"))
        decodes, _ = split_decodes(step.query_start_loc, step.seq_lens, step.block_table, 1)
        kernel(layer.by_run(step.query), layer.cache, decodes, output)
        layer.check(output, step)


def test_a_hundred_times_larger_scores_stay_finite(make_layer):
    layer = make_layer(*TIERS)
    step = layer.step((63, 300), (1, 1))
    step.query.mul_(100)
    torch.testing.assert_close(run(layer, step, vector.FLOAT32), layer.twin(step), atol=1e-3, rtol=1e-3)


def test_a_soft_cap_of_scores_that_are_far_beyond_it(make_layer):
    layer = make_layer(*TIERS, soft_cap=2.0)
    step = layer.step((63, 300), (1, 1))
    step.query.mul_(1e6)
    found = run(layer, step, vector.FLOAT32)
    torch.testing.assert_close(found.double(), layer.expected(step), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("width", [4, 2])
def test_tables_of_bfloat16_hold_the_odd_integers(width):
    for code in range(1 << width):
        odd = 2 * code - (1 << width) + 1
        bits = torch.tensor([vector._bfloat16(odd)]).to(torch.int32).to(torch.int16)
        assert bits.view(torch.bfloat16).item() == odd


def test_dtypes_without_kernels_are_refused(make_layer):
    layer = make_layer(("16x4", "16x4"))
    with pytest.raises(NotImplementedError, match="float64"):
        decode.LayerDecode(layer.bases, SCALE, layer.num_heads, torch.float64, decode.DecodeScratch())


def test_pages_of_other_sizes_are_refused(make_layer):
    layer = make_layer(("16x4", "16x4"))
    # A layer of the fixture has a table for the Triton kernels, which refuse such pages too.
    bases = dataclasses.replace(layer.bases, layout=dataclasses.replace(layer.layout, block_size=8))
    for build in (
        lambda: decode.LayerDecode(bases, SCALE, layer.num_heads, layer.dtype, decode.DecodeScratch()),
        lambda: type(layer.table).build(bases),
    ):
        with pytest.raises(ValueError, match="pages of 8 tokens; use a block size that is a multiple of 16"):
            build()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_default_dtype_changes_nothing(default, make_layer):
    layer = make_layer(*TIERS, soft_cap=5.0)
    step = layer.step((1000, 17), (1, 1))
    expected = run(layer, step, None)
    torch.set_default_dtype(default)
    try:
        found = run(layer, step, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_variants_have_files_of_their_own(tmp_path):
    names = "import torch; from mkv_kernels.compiled.decode import KINDS; from mkv_kernels.compiled import worker\n"
    compiles = "for kind in (0, 1): worker.compile_worker(kind, 1)"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", names + compiles], env=environment, timeout=300, check=True)
    assert len(list(tmp_path.rglob("*.nbi"))) == len(list(tmp_path.rglob("*.nbc"))) == 2


def test_leaves_modules_open_to_inspection():
    """Else no vLLM engine could start in this process any more: see the package."""
    from llvmlite.binding import ffi

    assert vars(ffi.lib) == {}


@pytest.mark.parametrize(("processor", "feature"), [("haswell", "avx2"), ("skylake-avx512", "avx512bw")])
def test_processors_without_bfloat16(processor, feature, tmp_path):
    if not vector.processor_has(feature):
        pytest.skip(f"the processor has no {feature}")
    settings = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    chosen = [
        "test_compiled_decode.py::test_equals_the_twin[tiers-bfloat16]",
        "test_store.py::test_bfloat16[all-tiers-compiled]",
    ]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *(str(Path(__file__).parent / test) for test in chosen)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=300)
    assert ran.returncode == 0 and "2 passed" in ran.stdout, ran.stdout + ran.stderr
