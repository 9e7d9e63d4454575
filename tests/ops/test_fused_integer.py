# SPDX-License-Identifier: Apache-2.0
"""Decode over codes by products of 8-bit integers: what it takes, against float64, and where its 16 bits could fail."""

from __future__ import annotations

import os

import pytest
import torch

from mkv_kernels.fused import decode as module
from mkv_kernels.fused.fields import bytes_ptx, field_ptx
from mkv_kernels.fused.table import Shapes
from mkv_kernels.layout import PageLayout
from mkv_kernels.pages import view_pages

HALF = torch.float16
LENGTHS = (1, 15, 16, 17, 63)
# Tiers alone and together, beside others, beside none; words of one to five tiles; all sizes of heads and pages.
SHAPES = {
    "2-bits": ([("2x4", "2x3"), ("2x1", "2x4")], {"M": 1}, 2),
    "4-bits": ([("4x4", "4x3"), ("4x1", "4x4")], {"M": 3, "block_size": 64}, 1),
    "8-bits": ([("8x4", "8x3"), ("8x1", "8x4")], {}, 4),
    "all-tiers": ([("16x1 8x1 4x1 2x1", "16x2 8x1 2x1"), ("8x1 4x2 2x1", "8x1 4x1 2x2")], {}, 2),
    "a-tier-each": ([("16x2", "2x2"), ("8x3", "4x1"), ("4x2", "8x1"), ("2x4", "16x1")], {"M": 1}, 2),
    "nothing-stored": ([("", "4x4"), ("4x1", ""), ("", "")], {}, 2),
    "keys-alone": ([("8x1 4x2", "16x4"), ("2x2", "16x1")], {}, 1),
    "values-alone": ([("16x4", "8x1 4x2"), ("16x1", "2x2")], {}, 1),
    "d128": ([("8x1 4x5 2x2", "4x2 2x1"), ("4x3 2x2", "8x1 4x4 2x3")], {"d": 128, "block_size": 128}, 2),
    "d96-folded": ([("4x6", "4x2 2x3"), ("8x2 2x4", "4x1")], {"d": 96, "fold_up": True}, 2),
    "d256": ([("8x4 4x8", "4x4 2x8"), ("2x16", "2x1")], {"d": 256, "M": 2}, 1),
    "j2": ([("8x1 4x3 2x4", "4x4 2x4")], {"J": 2, "M": 2}, 2),
    "j4-one-head": ([("4x6 2x10", "8x1 4x4 2x10")], {"J": 4, "M": 1}, 2),
}


@pytest.fixture
def make_counted(make_layer, monkeypatch):
    """Layers whose launches are by integers, or the test fails."""
    launched = []
    real = module.on

    def on(kernel, grid):
        if kernel is not module._attend_kernel:
            launched.append(kernel)
            return real(kernel, grid)
        raise AssertionError("not by integers")

    monkeypatch.setattr(module, "on", on)

    def make(*groups, **settings):
        layer = make_layer(*groups, **{"dtype": HALF} | settings)
        assert layer.table.shapes.integers is not None
        return layer

    yield make
    assert launched


@pytest.mark.parametrize("shape", SHAPES)
def test_errs_no_more_than_its_twin(make_counted, shape):
    groups, settings, num_splits = SHAPES[shape]
    layer = make_counted(*groups, **settings)
    step = layer.step((*LENGTHS, 200), [1] * (len(LENGTHS) + 1), padding=1)
    layer.check(layer.decode(step, num_splits=num_splits), step)


@pytest.mark.skipif(
    not torch.cuda.is_available() and "MKV_RUN_PTX" not in os.environ,
    reason="the interpreter's bfloat16 is not that of a GPU",
)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(make_counted, shape):
    groups, settings, num_splits = SHAPES[shape]
    layer = make_counted(*groups, **settings | {"dtype": torch.bfloat16})
    step = layer.step((*LENGTHS, 300), [1] * (len(LENGTHS) + 1))
    layer.check(layer.decode(step, num_splits=num_splits), step)


@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (16, 0.5), (100, 0.0), (0, 1.0)])
def test_windows_and_soft_caps(make_counted, window, soft_cap):
    layer = make_counted(("8x1 4x2", "4x1 2x2"), ("4x2 2x2", "16x1 4x2"), M=2, window=window, soft_cap=soft_cap)
    # One query or two: 4 rows in all.
    step = layer.step((2, 17, 130, 260), (2, 1, 2, 1), padding=1)
    for num_splits in (1, 4):
        layer.check(found := layer.decode(step, max_queries=2, num_splits=num_splits), step)
    if window:
        assert layer.poison_before_windows(step)
        again = layer.decode(step, max_queries=2, num_splits=num_splits)
        assert torch.equal(again, found), "something before a window was read"


@pytest.mark.parametrize("sharpness", [0.0, 8.0])
def test_a_token_of_much_weight_takes_nothing_from_others(make_counted, sharpness):
    """Weights are numbers of 16 bits by the largest of a tile, not of a context. Without scores all count alike."""
    layer = make_counted(("8x1 4x2", "4x3"), ("4x2 2x2", "8x1 2x2"))
    step = layer.step((130, 300), (1, 1))
    step.query.mul_(sharpness)
    for page in view_pages(layer.cache, layer.layout):
        block, slot = step.block_table[1, :1].long(), torch.tensor([5], device=layer.cache.device)
        large = 200 * torch.randn(1, page.value.exact.shape[1], page.value.layout.rank, device=layer.cache.device)
        page.value.write(block, slot, large)
    layer.check(layer.decode(step, num_splits=2), step)


def test_layers_that_are_too_wide_are_left_to_others():
    def integers(*sides, itemsize=2, head_size=128):
        layout = PageLayout((sides,), 16, itemsize)
        return Shapes.of(layout.groups, head_size).integers

    assert integers((16,) * 8, (16,) * 8) is None, "without codes"
    assert integers((8,) * 8, (4,) * 8) is not None
    # Sums of products with more words would not fit their 32 bits.
    assert integers((8,) * 20, (0,) * 20) is not None
    assert integers((8,) * 24, (0,) * 24) is None
    assert integers((4,) * 32, (4,) * 32) is None


def test_ptx_takes_fields_where_they_lie():
    words = [0x8421, 0xFEDC, 0x0F5A, 0x37C8]
    for half in range(2):
        name, *operands = plain(bytes_ptx)(half).rstrip(";").replace(",", "").split()
        assert [name, *operands[:3]] == ["prmt.b32", "$0", "$1", "$2"]
        both = b"".join(word.to_bytes(2, "little") for word in words)
        selected = [both[int(digit)] for digit in reversed(f"{int(operands[3], 0):04x}")]
        assert selected == [word >> 8 * half & 0xFF for word in words]
    for byte in range(256):
        low, high, first, third = (execute(plain(field_ptx)(field), byte * 0x01010101) for field in range(4))
        assert low == byte % 16 and high == byte // 16 * 16 - 128
        assert first == byte % 4 and third == byte // 16 % 4 * 16


def plain(function):
    """A function of kernels' compile time, as Python's own."""
    return getattr(function, "fn", function)


def execute(code: str, word: int) -> int:
    """What becomes of four equal bytes: one signed byte."""
    name, _to, _source, *constants = code.rstrip(";").replace(",", "").split()
    masked = word & int(constants[0], 0)
    if name == "lop3.b32":
        assert int(constants[2], 0) == 0x6A  # (a & b) ^ c
        masked ^= int(constants[1], 0)
    else:
        assert name == "and.b32" and len(constants) == 1
    (byte,) = set(masked.to_bytes(4, "little"))
    return byte - 256 if byte > 127 else byte
