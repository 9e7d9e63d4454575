# SPDX-License-Identifier: Apache-2.0
"""Quantised caches of today, to compare with at equal bytes: their published rules, applied to a model's own cache.

Keys after RoPE and values are rounded, per token and KV head and in float32, to what such a cache would hold, and
attention goes on with that. "vLLM" is vLLM 0.32:

    fp8             e4m3 with scale 1, what vLLM's `--kv-cache-dtype fp8` does without calibrated scales
    int8            vLLM's `int8_per_token_head`: symmetric, a float32 scale
    int4            vLLM's `int4_per_token_head`: Hadamard rotation, minimum and maximum, a float32 scale whose lowest
                    4 bits are the zero point
    int3, int2      the same idea where vLLM has none: the minimum is kept as it is, in float16 as the scale is, since
                    a zero point of 2 or 3 bits would be coarse
    turboquant4, turboquant3, turboquant2
                    Lloyd-Max codes of the rotated vector in units of its norm (TurboQuant, arXiv:2504.19874; DRIVE,
                    arXiv:2105.08339). As vLLM's keys: the codebook for a Gaussian, the norm in float16. Different from
                    vLLM: values are coded as keys are (there: uniformly, without rotation, in 2 more bytes); signs
                    are flipped before the Hadamard transform; every layer is coded (there: neither the first two nor
                    the last two); and 2 bits exist.
    turboquant4_nc, turboquant3_nc, turboquant2_nc
                    the same with vLLM's norm correction: what the codes stand for is scaled to the norm that is
                    stored, which takes no byte and gives much

Every one stores its scales within the bytes that it is said to take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from vllm_mkv.arguments import check_against
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.fit.bases import hadamard
from vllm_mkv.fit.quality import Cache

SIGNS_SEED = 0x9E3779B9
"""Of the signs that vLLM flips before the Hadamard transform of its 4-bit cache."""
LEAST_SCALE = 1e-6
"""Below which vLLM lets no scale of its integer caches fall."""
LARGEST = 65504.0
"""Of float16."""


@dataclass(frozen=True)
class Rival:
    """A handler of `vllm_mkv.fit.attention.intercepted`: keys and values as a quantised cache gives them back."""

    bits: int
    scale_bytes: int
    """Of one head's key or value, beside its codes."""
    quantised: Callable[[Tensor, int], Tensor]
    """(x float32 [.., d], bits) -> what the cache gives back of it, float32 [.., d]."""

    def head_bytes(self, head_size: int) -> int:
        """Of one head's key or value, in whole bytes."""
        return -(-head_size * self.bits // 8) + self.scale_bytes

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (self.quantised(heads.float(), self.bits).to(heads.dtype) for heads in (key, value))
        return keys, values


def fp8(x: Tensor, bits: int) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Codes -2^(bits-1) .. 2^(bits-1) - 1 of one scale per vector, from its largest magnitude."""
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / most).clamp(min=LEAST_SCALE)
    return (x / scale).round().clamp(-most - 1, most) * scale


def with_zero_point(x: Tensor, bits: int) -> Tensor:
    """Rotated codes 0 .. 2^bits - 1 of a float32 scale that has the zero point, a code itself, in its lowest bits."""
    most, y = 2**bits - 1, rotated(x)
    least, largest = y.aminmax(dim=-1, keepdim=True)
    scale = ((largest - least) / most).clamp(min=LEAST_SCALE)
    zero = (-least / scale).round().clamp(0, most)
    codes = (y / scale + zero).round().clamp(0, most)
    stored = (scale.view(torch.int32) & -(most + 1)).view(torch.float32)
    return unrotated((codes - zero) * stored)


def with_minimum(x: Tensor, bits: int) -> Tensor:
    """Rotated codes 0 .. 2^bits - 1 of a float16 scale above a float16 minimum."""
    most, y = 2**bits - 1, rotated(x)
    least, largest = y.aminmax(dim=-1, keepdim=True)
    least = as_float16(least)
    scale = as_float16((largest - least) / most)
    codes = ((y - least) / torch.where(scale > 0, scale, 1)).round().clamp(0, most)
    return unrotated(codes * scale + least)


def lloyd_max(x: Tensor, bits: int) -> Tensor:
    """Rotated codes of the coordinates in units of norm / sqrt(d), and the norm in float16."""
    norm = x.norm(dim=-1, keepdim=True)
    return unrotated(gaussian_codes(x, norm, bits) * as_float16(norm) / x.shape[-1] ** 0.5)


def norm_corrected(x: Tensor, bits: int) -> Tensor:
    """As `lloyd_max`, scaled to the norm that is stored."""
    norm = x.norm(dim=-1, keepdim=True)
    stored = gaussian_codes(x, norm, bits)
    return unrotated(stored * (as_float16(norm) / stored.norm(dim=-1, keepdim=True)))


def gaussian_codes(x: Tensor, norm: Tensor, bits: int) -> Tensor:
    """The codebook's level nearest to each rotated coordinate in units of norm / sqrt(d): [.., d], norm [.., 1]."""
    unit = norm / x.shape[-1] ** 0.5
    levels = gaussian_levels(bits).to(x.device)
    return levels[torch.bucketize(rotated(x) / torch.where(unit > 0, unit, 1), (levels[1:] + levels[:-1]) / 2)]


@cache
def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels of least mean squared error for a unit Gaussian, float32 and ascending.

    Found by Lloyd's iteration (Least squares quantization in PCM, 1982): each level is the mean of what is nearest to
    it, which for a Gaussian is the difference of the densities at its borders, divided by the mass between them.
    """
    normal = Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    infinity = levels.new_full((1,), torch.inf)
    for _ in range(100_000):
        borders = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        previous, levels = levels, -normal.log_prob(borders).exp().diff() / normal.cdf(borders).diff()
        if (levels - previous).abs().max() < 1e-10:
            return levels.float()
    raise AssertionError("Lloyd's iteration did not settle")


def rotated(x: Tensor) -> Tensor:
    """Signs flipped, then the orthogonal Hadamard transform of each block of the largest power of two that divides d.

    Shape: [.., d] to the same.
    """
    blocks = _blocks(x)
    matrix = _hadamard(blocks.shape[-1]).to(x.device)
    return (blocks * signs(blocks.shape[-1]).to(x.device) @ matrix).reshape(x.shape)


def unrotated(x: Tensor) -> Tensor:
    """The inverse of `rotated`."""
    blocks = _blocks(x)
    matrix = _hadamard(blocks.shape[-1]).to(x.device)
    return (blocks @ matrix * signs(blocks.shape[-1]).to(x.device)).reshape(x.shape)


@cache
def _hadamard(size: int) -> Tensor:
    return hadamard(size).float()


def _blocks(x: Tensor) -> Tensor:
    d = x.shape[-1]
    return x.unflatten(-1, (-1, d & -d))


@cache
def signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(SIGNS_SEED)
    return 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1


def as_float16(x: Tensor) -> Tensor:
    """What float16 keeps of a number, the largest that it has in place of infinity."""
    return x.clamp(-LARGEST, LARGEST).half().float()


RIVALS = {
    "fp8": Rival(8, 0, fp8),
    "int8": Rival(8, 4, symmetric),
    "int4": Rival(4, 4, with_zero_point),
    "int3": Rival(3, 4, with_minimum),
    "int2": Rival(2, 4, with_minimum),
    "turboquant4": Rival(4, 2, lloyd_max),
    "turboquant3": Rival(3, 2, lloyd_max),
    "turboquant2": Rival(2, 2, lloyd_max),
    "turboquant4_nc": Rival(4, 2, norm_corrected),
    "turboquant3_nc": Rival(3, 2, norm_corrected),
    "turboquant2_nc": Rival(2, 2, norm_corrected),
}


def rival_caches(names: Sequence[str], fingerprint: ModelFingerprint) -> list[Cache]:
    """Caches of these names for a model, most bytes first.

    Raises:
        ValueError: a name is unknown.
    """
    check_against(names)
    heads = 2 * fingerprint.num_hidden_layers * fingerprint.num_key_value_heads
    caches = [Cache(name, RIVALS[name], heads * RIVALS[name].head_bytes(fingerprint.head_size)) for name in set(names)]
    return sorted(caches, key=lambda cache: (-cache.bytes_per_token, cache.name))
