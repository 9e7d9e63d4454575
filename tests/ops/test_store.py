# SPDX-License-Identifier: Apache-2.0
"""The store kernels, Triton's and the compiled one of CPUs, against their twin: q', and every byte of the pages."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mkv_kernels.codes import encode, scale_values
from mkv_kernels.fused.store import StoreWorkspace, project_and_store
from mkv_kernels.pages import view_pages
from mkv_kernels.store import project_and_store as twin

HALF = torch.float16


def inputs(layer, T):
    heads = (layer.num_heads, layer.G * layer.J, layer.G * layer.J)
    # Heads are dense, tokens are not: q, k and v are columns of one projection.
    qkv = torch.randn(T, sum(heads) + 1, layer.d).to(layer.memory.device, layer.dtype)
    return tuple(part for part in qkv.split([*heads, 1], 1))[:3]


def some_slots(layer, T):
    slots = torch.randperm(layer.memory.shape[0] * layer.layout.block_size)[:T]
    slots[1::5] = -1
    return slots.to(layer.memory.device)


def run_compiled(layer, q, k, v, slots):
    from mkv_kernels.compiled.store import LayerStore, StoreScratch

    store = LayerStore(layer.bases, layer.num_heads, layer.dtype, StoreScratch())
    projected = torch.empty(len(q), layer.G, layer.J, layer.M, layer.table.rank_k, dtype=layer.dtype)
    for run_bases, found in zip(layer.bases.runs, store(q, k, v, layer.cache, slots), strict=True):
        projected[:, list(run_bases.run.groups), ..., : run_bases.rank_k] = found
    return projected


def run(layer, q, k, v, slots, workspace=None):
    T = len(q)
    shape = (T, layer.G, layer.J, layer.M, layer.table.rank_k + 16)
    projected = torch.full(shape, float("nan"), dtype=layer.dtype, device=q.device)
    workspace = workspace or StoreWorkspace.make(layer.table, T)
    workspace.scratch.fill_(float("nan"))
    project_and_store(q, k, v, layer.cache, layer.table, slots, projected, workspace)
    assert not workspace.counters.any()
    return projected


def run_twin(layer, q, k, v, slots):
    kept = (slots >= 0).nonzero()[:, 0]
    return twin(q, k, v, view_pages(layer.cache, layer.layout), layer.bases, slots[kept], kept)


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the fixtures are on the GPU")
KERNELS = [run, pytest.param(run_compiled, marks=ON_CPU)]
both = pytest.mark.parametrize("store", KERNELS, ids=["triton", "compiled"])


def check(layer, T, store):
    """q' errs at most twice as much as the twin's; so do stored coordinates, but for codes at the edge of a level."""
    q, k, v = inputs(layer, T)
    slots = some_slots(layer, T)
    queries = run_twin(layer, q, k, v, slots)
    stored = layer.memory.clone()
    layer.poison()
    projected = store(layer, q, k, v, slots)
    eps = torch.finfo(layer.dtype).eps
    kept = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[kept] // layer.layout.block_size, slots[kept] % layer.layout.block_size
    own = view_pages(layer.cache, layer.layout)
    elements = layer.layout.page_bytes // layer.dtype.itemsize
    others = view_pages(stored[:, :elements].view(layer.cache.shape), layer.layout)
    x_k, x_v = (x.double().reshape(T, layer.G, -1) for x in (k, v))
    for run_bases, query, a, b in zip(layer.bases.runs, queries, own, others, strict=True):
        groups = list(run_bases.run.groups)
        q_TGJMd = q.double().reshape(T, layer.G, layer.J, layer.M, -1)[:, groups]
        exact = torch.einsum("tgjmd,gjdr->tgjmr", q_TGJMd, run_bases.query_up.double())
        found = projected[:, groups, ..., : run_bases.rank_k]
        assert_errs_less(found, query, exact, eps)
        k_exact = torch.einsum("tgn,gnr->tgr", x_k[kept][:, groups], run_bases.key_down.double()) - run_bases.key_shift
        if run_bases.value_down is None:
            v_exact = x_v[kept][:, groups, : run_bases.rank_v] - run_bases.value_shift
        else:
            v_exact = torch.einsum("tgn,gnr->tgr", x_v[kept][:, groups], run_bases.value_down.double())
            v_exact -= run_bases.value_shift
        for side, other, x in ((a.key, b.key, k_exact), (a.value, b.value, v_exact)):
            exact, packed, scale = encode(x, side.layout)
            assert_errs_less(side.exact[block, :, offset], other.exact[block, :, offset], exact, eps)
            if scale is None:
                continue
            scales = side.scales[block, :, offset]
            # A root mean square within a rounding of the middle between two scales may get either.
            assert (scales.int() - scale.int()).abs().max() <= 1 and few(scales != scale, 0.05, layer)
            for tier, codes in zip(side.coded, packed, strict=True):
                found = tier[block, :, offset].view(torch.uint8)
                assert few(found != codes.contiguous().view(torch.uint8), 0.02, layer)


def few(differ, share, layer):
    interpreted = layer.memory.device.type == "cpu" and "MKV_RUN_PTX" not in os.environ
    if layer.dtype == torch.float32 or interpreted:
        return differ.float().mean() < share
    # On tensor cores, bases have 10 bits of mantissa; of a handful, one may differ.
    return int(differ.sum()) <= max(1, 0.05 * differ.numel())


def assert_errs_less(found, plain, exact, eps):
    if exact.numel():
        error, bound = (found.double() - exact).abs(), (plain.double() - exact).abs()
        assert error.mean() <= 2 * bound.mean() + eps * exact.abs().mean()
        assert error.max() <= 2 * bound.max() + 4 * eps * exact.abs().max()


SHAPES = {
    "uneven-ranks": ([("16x4", "16x1"), ("16x1", "16x4"), ("16x3", "16x3")], {}, 20),
    "j2-heads7-d64": ([("16x7", "16x3"), ("16x1", "16x8")], {"J": 2, "M": 7, "dtype": HALF}, 17),
    "j4-heads1-d96": ([("16x7", "16x24"), ("16x1", "16x3")], {"J": 4, "M": 1, "d": 96}, 15),
    "j8-heads1-d128": ([("16x1 8x2 4x12 2x8", "8x1 4x6 2x8")], {"J": 8, "M": 1, "d": 128, "block_size": 32}, 3),
    "head-256": ([("16x1", "16x16"), ("16x16", "16x1")], {"M": 8, "d": 256, "block_size": 128}, 5),
    "folded": ([("16x1 4x2", "16x1 4x2 2x1"), ("4x6", "4x1")], {"d": 96, "fold_up": True, "fold_down": True}, 16),
    "folded-down": ([("8x2", "16x1 4x2")], {"J": 2, "fold_down": True, "dtype": HALF}, 80),
    "a-tier-each": ([("16x2", "2x2"), ("8x3", "4x1"), ("4x2", "8x1"), ("2x4", "16x1")], {"M": 1}, 33),
    "all-tiers": ([("16x1 8x2 4x3 2x1", "16x2 8x1 4x1 2x2"), ("2x1", "16x8")], {"J": 2, "dtype": HALF}, 1),
    "many-tokens": ([("16x1 8x2 4x3 2x1", "16x2 8x1 4x1 2x2"), ("2x1", "")], {"J": 2, "M": 1}, 150),
}


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_writes_what_the_twin_does(make_layer, shape, store):
    groups, settings, T = SHAPES[shape]
    check(make_layer(*groups, **settings), T, store)


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(make_layer, shape, store):
    if store is run and not torch.cuda.is_available():
        pytest.skip("the interpreter's bfloat16 is not that of a GPU")
    groups, settings, T = SHAPES[shape]
    check(make_layer(*groups, **settings | {"dtype": torch.bfloat16}), T, store)


@both
@pytest.mark.parametrize("T", [3, 100])
def test_exactly_the_bytes_of_stored_tokens_are_written(make_layer, T, store):
    written = {}
    for kernel in (store, run_twin):
        written[kernel] = 0
        for fill in (0x00, 0xFF):  # a byte that is written equals one of them at most
            layer = make_layer(("16x1 8x1 4x1 2x1", "4x3"), ("2x4", "16x2 8x2"))
            tensors, slots = inputs(layer, T), some_slots(layer, T)
            layer.poison(fill)
            kernel(layer, *tensors, slots)
            written[kernel] = written[kernel] | (layer.memory.view(torch.uint8) != fill)
    assert torch.equal(written[store], written[run_twin])


def test_a_workspace_serves_one_layer_after_another(make_layer):
    wide, narrow = make_layer(("4x4", "16x1 8x3")), make_layer(("16x1", "4x1"), ("8x4", "2x4"), J=1)
    workspace = StoreWorkspace.make(narrow.table, 40)
    for layer in (wide, narrow, wide):
        tensors, slots = inputs(layer, 40), some_slots(layer, 40)
        layer.poison()
        run(layer, *tensors, slots, workspace)
        found = layer.memory.clone()
        layer.poison()
        run(layer, *tensors, slots)
        assert torch.equal(found.view(torch.uint8), layer.memory.view(torch.uint8))


@both
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_outliers_and_empty_tokens_stay_finite(make_layer, dtype, store):
    layer = make_layer(("16x1 4x2", "8x2 2x1"), dtype=dtype)
    q, k, v = inputs(layer, 20)
    for x in (k, v):
        x[3] *= 1e4
        x[7] = 0
    store(layer, q, k, v, torch.arange(20, device=k.device))
    for page in view_pages(layer.cache, layer.layout):
        for side in (page.key, page.value):
            assert scale_values(side.scales[0]).isfinite().all() and side.exact[0].isfinite().all()


@st.composite
def layers(draw):
    J, M = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    block = st.lists(st.sampled_from([16, 8, 4, 2, 0]), min_size=2 * J, max_size=2 * J)
    side = block.map(lambda widths: tuple(sorted(widths, reverse=True)))
    groups = st.lists(st.tuples(side, side), min_size=1, max_size=3)
    # A layer that stores nothing has no cache.
    widths = draw(groups.filter(lambda groups: any(any(side) for group in groups for side in group)))
    shape = {"J": J, "M": M, "d": 32, "fold_down": draw(st.booleans())}
    shape |= {"block_size": draw(st.sampled_from([16, 48, 128])), "dtype": draw(st.sampled_from([torch.float32, HALF]))}
    return tuple(widths), shape, draw(st.integers(1, 90)), draw(st.integers(0, 99))


# Shrinking would take minutes in the interpreter; cases are small as they are.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=layers())
def test_any_layer(make_layer, case):
    widths, shape, T, seed = case
    check(make_layer(widths=widths, **shape, seed=seed), T, run)


@ON_CPU
@settings(max_examples=50, deadline=None, derandomize=True)
@given(case=layers())
def test_any_layer_compiled(make_layer, case):
    widths, shape, T, seed = case
    check(make_layer(widths=widths, **shape, seed=seed), T, run_compiled)


@both
@pytest.mark.parametrize("bits", [0x7E00, 0x7FFF])
def test_what_is_not_a_number_shows(make_layer, bits, store):
    """A GPU's own have a full mantissa."""
    layer = make_layer(("8x1 4x1", "4x2"), ("8x2", "16x1 2x1"), dtype=torch.float16)
    q, k, v = inputs(layer, 2)
    for x in (k, v):
        x.view(torch.int16)[1, 0, 3] = bits
    store(layer, q, k, v, torch.tensor([0, 1], device=q.device))
    for own, page in zip(layer.layout.runs, view_pages(layer.cache, layer.layout), strict=True):
        for side in (page.key, page.value):
            assert scale_values(side.scales[0, 0, :2]).isnan().tolist() == [False, own.groups == (0,)]


def test_errors_name_the_mend(make_layer):
    layer = make_layer(("16x1 4x1", "16x4"))
    q, k, v = inputs(layer, 4)
    slots = some_slots(layer, 4)
    with pytest.raises(ValueError, match="one dense int64 per token"):
        run(layer, q, k, v, slots.int())
    with pytest.raises(ValueError, match="workspace's scratch"):
        run(layer, q, k, v, slots, StoreWorkspace.make(layer.table, 1))
    with pytest.raises(ValueError, match="this layer has 1 latent groups"):
        run(layer, q, k[:, :, :32], v, slots)
    with pytest.raises(ValueError, match="must be the same one of"):
        run(layer, q.to(HALF), k, v, slots)
