# SPDX-License-Identifier: Apache-2.0
"""The quantiser: codes round-trip exactly, steps are the best ones, and what is promised of odd integers holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkv_kernels.codes import (
    LARGEST_SCALE,
    LEAST_SCALE,
    MEAN_SQUARED_ERRORS,
    STEPS,
    decode,
    encode,
    multipliers,
    odd_integers,
    pack,
    quantise,
    round_trip,
    scale_codes,
    scale_values,
    unpack,
)
from mkv_kernels.layout import WIDTHS, PageLayout

CODED = (8, 4, 2)


@pytest.mark.parametrize("width", CODED)
@pytest.mark.parametrize("size", [16, 48, 256])
def test_codes_round_trip_exactly(width, size):
    codes = torch.randint(0, 1 << width, (5, 3, size), dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.shape == (5, 3, size * width // 16)
    assert torch.equal(unpack(packed, width), codes)


@pytest.mark.parametrize("width", CODED)
def test_every_code_is_an_odd_integer_that_quantises_to_itself(width):
    codes = torch.arange(1 << width, dtype=torch.uint8)
    odd = odd_integers(codes, width)
    assert (odd % 2).abs().eq(1).all() and odd.abs().max() == (1 << width) - 1
    assert torch.equal(odd.to(torch.bfloat16).to(torch.int16), odd), "bf16 holds it exactly"
    assert torch.equal(quantise(odd * (STEPS[width] / 2), width), codes)


@pytest.mark.parametrize("width", CODED)
def test_unpacking_a_part_of_words_gives_neighbours(width):
    codes = torch.randint(0, 1 << width, (64,), dtype=torch.uint8)
    words = pack(codes, width).to(torch.int32)
    part = 64 * width // 16
    for i in range(16 // width):
        found = (words >> (i * width)) & ((1 << width) - 1)
        assert torch.equal(found.to(torch.uint8), codes[i * part : (i + 1) * part])


@pytest.mark.parametrize("width", CODED)
def test_the_step_is_near_the_best_for_a_gaussian_and_better_for_tokens_of_uneven_energy(width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000_000, dtype=torch.float64, generator=generator)

    def error(step):
        half = 1 << (width - 1)
        return float((((x / step).floor().clamp(-half, half - 1) + 0.5) * step - x).square().mean())

    assert error(STEPS[width]) == pytest.approx(MEAN_SQUARED_ERRORS[width], rel=0.03)
    best = {8: 0.030762, 4: 0.335201, 2: 0.995687}[width]
    assert error(best) < error(STEPS[width]) < 1.12 * error(best)
    blocks = torch.randn(125_000, 1, generator=generator, dtype=torch.float64).mul(0.6).exp()
    x = (x.view(-1, 16) * blocks / blocks.square().mean().sqrt()).flatten()
    assert error(STEPS[width]) < error(best)


@st.composite
def sides(draw):
    num_blocks = draw(st.integers(1, 12))
    return tuple(
        sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=num_blocks, max_size=num_blocks)), reverse=True)
    )


@settings(max_examples=60, deadline=None)
@given(widths=sides(), seed=st.integers(0, 1000))
def test_what_the_page_keeps_is_the_round_trip(widths, seed):
    x = torch.randn(4, 3, 16 * len(widths), generator=torch.Generator().manual_seed(seed))
    side = PageLayout(((widths, widths),), 16, 4).groups[0].key
    exact, packed, scale = encode(x[..., : side.rank], side)
    assert sum(part.shape[-1] for part in packed) == sum(r.size * r.width // 16 for r in side.regions if r.width < 16)
    read = decode(exact, packed, scale, side, torch.float32) * multipliers(widths)[: side.rank]
    expected = round_trip(x, widths)
    torch.testing.assert_close(read, expected[..., : side.rank], rtol=1e-6, atol=1e-7)
    assert (expected[..., side.rank :] == 0).all()


def test_more_bits_err_less():
    x = torch.randn(200, 64)
    errors = [float((round_trip(x, (width,) * 4) - x).square().mean()) for width in WIDTHS]
    assert errors == sorted(errors) and errors[0] == 0
    for width, error in zip(WIDTHS[1:], errors[1:], strict=True):
        assert error == pytest.approx(MEAN_SQUARED_ERRORS[width], rel=0.2)


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-3, 1e3, 1e7, math.inf])
def test_scales_are_finite_whatever_the_token(factor):
    x = torch.randn(3, 32).nan_to_num() * factor if math.isfinite(factor) else torch.full((3, 32), 1e30)
    scale = scale_values(scale_codes(x))
    assert scale.isfinite().all() and (scale >= LEAST_SCALE).all() and (scale <= LARGEST_SCALE).all()
    assert round_trip(x, (4, 2)).isfinite().all()


def test_scales_follow_the_token():
    x = torch.randn(10, 32)
    torch.testing.assert_close(round_trip(x * 64, (4, 2)), round_trip(x, (4, 2)) * 64)


def test_a_scale_is_near_the_root_mean_square_and_stands_for_itself():
    x = torch.linspace(math.log2(LEAST_SCALE), math.log2(LARGEST_SCALE), 10_000).exp2()
    codes = scale_codes(x[:, None].expand(-1, 16))
    values = scale_values(codes)
    assert ((values / x - 1).abs() <= 1 / 16 + 1e-3).all()
    assert (values.diff() >= 0).all() and len(codes.unique()) == 8 * 30
    assert torch.equal(scale_codes(values[:, None].expand(-1, 16)), codes)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_token_that_is_not_a_number_shows(bits):
    """A GPU's own have a full mantissa, as the second."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert scale_values(scale_codes(torch.cat([torch.ones(1), nan])[None])).isnan().all()
    assert round_trip(torch.tensor([1.0, math.nan] * 16), (4, 2)).isnan().all()
