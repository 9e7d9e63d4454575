# SPDX-License-Identifier: Apache-2.0
"""Quantised caches to compare with: what they keep, what they take."""

import math
from itertools import pairwise

import pytest
import torch

from vllm_mkv.evaluation import rivals
from vllm_mkv.evaluation.rivals import RIVALS, gaussian_levels, rival_caches, rotated, unrotated
from vllm_mkv.fingerprint import ModelFingerprint

NC = ("turboquant2_nc", "turboquant3_nc", "turboquant4_nc")
ODD_SIZES = (1, 2, 48, 64, 80, 96)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(name, x):
    """Mean squared error, as a share of the mean square."""
    found = RIVALS[name].quantised(x, RIVALS[name].bits)
    return float((found - x).square().mean() / x.square().mean())


@pytest.mark.parametrize("size", ODD_SIZES)
def test_the_rotation_is_orthogonal_and_is_undone(size):
    matrix = rotated(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    x = gaussian(2, 3, 5, size)
    torch.testing.assert_close(unrotated(rotated(x)), x)


def test_the_rotation_spreads_an_outlier_over_its_block():
    outlier = torch.zeros(80)
    outlier[3] = 1
    torch.testing.assert_close(rotated(outlier).abs(), torch.tensor([0.25] * 16 + [0.0] * 64))


@pytest.mark.parametrize(
    "name, of_64, of_80, of_36",
    [
        ("fp8", 64, 80, 36),
        ("int8", 68, 84, 40),
        ("int4", 36, 44, 22),
        ("int3", 28, 34, 18),
        ("int2", 20, 24, 13),
        ("turboquant4", 34, 42, 20),
        ("turboquant3", 26, 32, 16),
        ("turboquant2", 18, 22, 11),
        ("turboquant2_nc", 18, 22, 11),
    ],
)
def test_bytes_count_scales_and_round_up(name, of_64, of_80, of_36):
    assert [RIVALS[name].head_bytes(size) for size in (64, 80, 36)] == [of_64, of_80, of_36]


def test_more_bits_are_less_error():
    # Heavy tails, as keys have.
    x = gaussian(500, 64) * gaussian(500, 64, seed=1).exp()
    for family in (("int2", "int3", "int4", "int8"), ("turboquant2", "turboquant3", "turboquant4"), NC):
        errors = [error(name, x) for name in family]
        assert all(more > 3 * less for more, less in pairwise(errors)), errors


def test_8_bits_are_nearly_exact():
    x = gaussian(500, 64)
    assert error("int8", x) < 1e-4
    assert error("fp8", x) < 1e-3


# Max, Quantizing for minimum distortion, 1960, table I.
@pytest.mark.parametrize("bits, distortion", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_codebook_has_the_published_distortion_and_no_better_neighbour(bits, distortion):
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    density = (-grid.square() / 2).exp() / math.sqrt(2 * math.pi) * (grid[1] - grid[0])

    def distortion_of(levels):
        nearest = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        return float(((grid - levels[nearest]).square() * density).sum())

    levels = gaussian_levels(bits).double()
    least = distortion_of(levels)
    assert least == pytest.approx(distortion, rel=1e-3)
    torch.testing.assert_close(levels, -levels.flip(0))
    for index in range(len(levels)):
        for step in (-0.01, 0.01):
            moved = levels.clone()
            moved[index] += step
            assert distortion_of(moved) > least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_codes_have_the_codebooks_error_on_gaussian_vectors(bits):
    codebook = gaussian_levels(bits).double()
    x = gaussian(2000, 128).double()
    nearest = codebook[torch.bucketize(x, (codebook[1:] + codebook[:-1]) / 2)]
    expected = float((nearest - x).square().mean())
    assert error(f"turboquant{bits}", x.float()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", NC)
def test_a_corrected_norm_is_the_vectors_own(name):
    x = gaussian(200, 48)
    found = RIVALS[name].quantised(x, RIVALS[name].bits)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    plain = RIVALS[name.removesuffix("_nc")].quantised(x, RIVALS[name].bits)
    torch.testing.assert_close(torch.cosine_similarity(found, plain), torch.ones(200))


@pytest.mark.parametrize("bits, name", [(4, "int4"), (3, "int3"), (2, "int2")])
def test_integer_codes_give_back_what_they_can_hold(bits, name):
    codes = torch.randint(0, 2**bits, (50, 64), generator=torch.Generator().manual_seed(0))
    codes[:, :2] = torch.tensor([0, 2**bits - 1])
    x = unrotated((codes - 1) * 0.5)
    torch.testing.assert_close(RIVALS[name].quantised(x, bits), x, atol=1e-5, rtol=1e-5)


def test_scales_are_rounded_to_what_is_stored():
    x = gaussian(20, 64)
    stored = rotated(RIVALS["int2"].quantised(x, 2))
    lowest = stored.amin(-1)
    torch.testing.assert_close(lowest, rotated(x).amin(-1).half().float(), atol=1e-6, rtol=0)
    scale = (stored.amax(-1) - lowest) / 3
    torch.testing.assert_close(scale, scale.half().float(), atol=1e-6, rtol=0)
    assert not torch.equal(lowest, rotated(x).amin(-1))
    norm = RIVALS["turboquant4"].quantised(x, 4) / RIVALS["turboquant4"].quantised(x / 3, 4)
    torch.testing.assert_close(norm, torch.full_like(norm, 3.0), rtol=2e-3, atol=0)


def test_zero_points_live_in_the_lowest_bits_of_the_scale(monkeypatch):
    for turn in ("rotated", "unrotated"):
        monkeypatch.setattr(rivals, turn, lambda x: x)
    x = gaussian(200, 64)
    stored = RIVALS["int4"].quantised(x, 4)
    # The code beside the zero point stands for the scale itself.
    scale = torch.where(stored > 0, stored, torch.inf).amin(-1)
    assert not (scale.view(torch.int32) & 15).any()
    torch.testing.assert_close(scale, (x.amax(-1) - x.amin(-1)) / 15, rtol=1e-5, atol=0)
    assert ((stored / scale[:, None]).round().amin(-1) < -3).all()


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_stay_zero_and_outliers_finite(name, dtype):
    key = gaussian(2, 3, 7, 48).to(dtype)
    key[0, 1, 2] = 0
    key[1, 0, 3] = 1e-7
    key[0, 0, 4] *= 100
    key[1, 2, 5] = 60_000 if dtype is torch.float16 else 1e30
    key[1, 2, 5, 0] = 0
    k, v = RIVALS[name](torch.nn.Identity(), key, key, key.flip(-1))
    for found in (k, v):
        assert found.dtype == dtype and found.shape == key.shape
        assert not found[0, 1, 2].any()
        # float16 has no room for what is rounded up beyond its largest number; nothing is ever no number.
        assert not found.isnan().any()
        assert found[:, :, :5].isfinite().all()
    outlier, given = k[0, 0, 4].float(), key[0, 0, 4].float()
    assert (outlier - given).norm() < 0.7 * given.norm()


@pytest.mark.parametrize("name", RIVALS)
def test_tokens_and_heads_do_not_touch_each_other(name):
    key = gaussian(1, 2, 4, 64)
    changed = key.clone()
    changed[0, 1, 2] *= 50
    (before, _), (after, _) = (RIVALS[name](torch.nn.Identity(), x, x, x) for x in (key, changed))
    same = torch.ones(1, 2, 4, dtype=torch.bool)
    same[0, 1, 2] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


def test_fp8_saturates():
    x = torch.tensor([0.5, -448.0, 449.0, -1e6, 0.3])
    assert rivals.fp8(x, 8).tolist() == [0.5, -448.0, 448.0, -448.0, 0.3125]


FINGERPRINT = ModelFingerprint(
    architecture="X", num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, head_size=64, rope={}
)


def test_caches_have_the_bytes_of_all_layers_heads_and_sides():
    caches = rival_caches(["turboquant2", "int4", "fp8", "int4"], FINGERPRINT)
    assert [(cache.name, cache.bytes_per_token) for cache in caches] == [
        ("fp8", 36 * 64),
        ("int4", 36 * 36),
        ("turboquant2", 36 * 18),
    ]


@pytest.mark.parametrize("name", ["int5", "", "INT4", "mkv"])
def test_unknown_caches_are_refused(name):
    with pytest.raises(ValueError, match=r"is no cache to compare with; known are fp8,int8,int4,"):
        rival_caches(["int4", name], FINGERPRINT)
