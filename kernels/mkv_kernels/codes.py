# SPDX-License-Identifier: Apache-2.0
"""The quantiser of the tiers of 8, 4 and 2 bits: coordinates to codes, codes to words, and back.

A quantised coordinate x of a token whose scale is s is stored as a code c in [0, 2^b) that stands for the odd integer
o = 2 c - (2^b - 1), and o times half the tier's step times s is what it is worth: a uniform mid-rise quantiser with no
zero point. Its step is a little wider than the one of least mean squared error for a unit Gaussian (J. Max, Quantizing
for minimum distortion, 1960), which whitened coordinates, divided by the root mean square of the token's own, are
close to.

A scale takes one byte, 5 bits of exponent and 3 of mantissa: the float16 number nearest to it that has only these, cut
to them. So it is within a seventeenth of the root mean square, and what divides a token's coordinates when they are
stored is exactly what multiplies their codes.

Words: a tier of S coordinates takes W = S b / 16 words of 16 bits per token. Word j holds, from its lowest bits on, the
codes of the coordinates j, j + W, j + 2 W, ..: unpacking one of the 16 / b parts gives neighbours, of the size that
products take, and needs no shuffle.
"""

from __future__ import annotations

import torch

from mkv_kernels.layout import BLOCK, WIDTHS, BlockWidths, SideLayout

STEPS = {8: 0.034, 4: 0.37, 2: 1.15}
"""Width of a level, in units of the token's scale. 10 to 15 % wider than what is best for a Gaussian (0.0308, 0.335,
0.996): tokens have blocks of more and of less energy than the scale that they share says, so the tails are heavier."""
MEAN_SQUARED_ERRORS = {16: 0.0, 8: 9.758e-5, 4: 0.012275, 2: 0.127381, 0: 1.0}
"""Of a unit Gaussian at the steps above; a coordinate that is not stored is taken for its mean."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-14, 61440.0
"""A token without any energy keeps a scale to divide by, an outlier one that is finite."""
SCALE_SHIFT = 7
"""Bits of a float16 number's mantissa that a scale does without."""
NAN_CODE = 0x7E00 >> SCALE_SHIFT
"""A scale that is no number, whatever its bits: a GPU's have a full mantissa, which rounding would carry into 0."""


def multipliers(widths: BlockWidths) -> torch.Tensor:
    """What a stored number is multiplied by to give its coordinate, token scales aside: half the step of its tier.

    It is folded into the bases that go up again (B of keys, D of values). Shape: [16 blocks], float32.
    """
    per_block = [STEPS[width] / 2 if width in STEPS else 1.0 for width in widths]
    return torch.tensor(per_block, dtype=torch.float32).repeat_interleave(BLOCK)


def scale_codes(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of the quantised coordinates of every token, as the page keeps it: [.., R] to [..] uint8.

    Of coordinates that are no numbers the scale is none; of infinite ones, it is the largest.
    """
    scales = x.square().mean(-1).sqrt().clamp(LEAST_SCALE, LARGEST_SCALE).to(torch.float16)
    codes = ((scales.view(torch.int16) + (1 << (SCALE_SHIFT - 1))) >> SCALE_SHIFT).to(torch.uint8)
    return codes.masked_fill_(scales.isnan(), NAN_CODE)


def scale_values(codes: torch.Tensor) -> torch.Tensor:
    """What `scale_codes` stand for: uint8 [..] to float32 [..]. NaN stays NaN."""
    return (codes.to(torch.int16) << SCALE_SHIFT).view(torch.float16).to(torch.float32)


def quantise(x: torch.Tensor, width: int) -> torch.Tensor:
    """Codes of coordinates that were divided by their token's scale: float [.., S] to uint8 [.., S]."""
    half = 1 << (width - 1)
    return (torch.floor(x / STEPS[width]) + half).clamp(0, 2 * half - 1).to(torch.uint8)


def odd_integers(codes: torch.Tensor, width: int) -> torch.Tensor:
    """What codes stand for: uint8 [.., S] to int16 [.., S], odd, less than 2^width in magnitude."""
    return codes.to(torch.int16) * 2 - ((1 << width) - 1)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [.., S] to int16 [.., S width / 16]; see the module's docstring for which code lies where."""
    parts = codes.to(torch.int16).unflatten(-1, (16 // width, -1))
    words = parts[..., 0, :]
    for part in range(1, 16 // width):
        words = words | (parts[..., part, :] << (part * width))
    return words


def unpack(words: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `pack`."""
    mask = (1 << width) - 1
    parts = [((words >> (part * width)) & mask).to(torch.uint8) for part in range(16 // width)]
    return torch.cat(parts, dim=-1)


def encode(x: torch.Tensor, side: SideLayout) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """What the page keeps of the coordinates of one side.

    Shapes:
        x: [.., R] float32, R the side's rank

    Returns:
        The 16-bit tier [.., R16], still in float32; words of every other tier, int16 [.., S width / 16]; and the
        scales' codes [..] uint8, None where no coordinate is quantised.
    """
    exact, rest = x[..., : side.exact], x[..., side.exact :]
    if side.scale_offset is None:
        return exact, [], None
    scale = scale_codes(rest)
    normal = (rest / scale_values(scale).to(x.dtype)[..., None]).split([region.size for region in side.coded], dim=-1)
    tiers = zip(normal, side.coded, strict=True)
    return exact, [pack(quantise(part, region.width), region.width) for part, region in tiers], scale


def decode(
    exact: torch.Tensor, packed: list[torch.Tensor], scale: torch.Tensor | None, side: SideLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Coordinates of the 16-bit tier, then the odd integers of the others times their token's scale: [.., R] in dtype.

    The odd integers are not multiplied by half their step here; bases are.
    """
    if scale is None:
        return exact.to(dtype)
    tiers = zip(packed, side.coded, strict=True)
    odd = [odd_integers(unpack(codes, region.width), region.width) for codes, region in tiers]
    scaled = torch.cat(odd, dim=-1).to(torch.float32) * scale_values(scale)[..., None]
    return torch.cat([exact.to(dtype), scaled.to(dtype)], dim=-1) if side.exact else scaled.to(dtype)


def round_trip(x: torch.Tensor, widths: BlockWidths) -> torch.Tensor:
    """Coordinates as their codes and scales give them back, 16-bit ones untouched: float [.., n] to [.., n].

    What `encode`, `decode` and `multipliers` do together, without bytes; coordinates of width 0 come back as 0.
    """
    counts = {width: BLOCK * widths.count(width) for width in WIDTHS}
    sizes = list(counts.values())
    parts = dict(zip(counts, x.split(sizes, dim=-1), strict=True))
    quantised = x[..., sizes[0] : sum(sizes[:4])]
    parts[0] = torch.zeros_like(parts[0])
    if quantised.shape[-1]:
        scale = scale_values(scale_codes(quantised)).to(x.dtype)[..., None]
        for width, step in STEPS.items():
            odd = odd_integers(quantise(parts[width] / scale, width), width).to(x.dtype)
            parts[width] = odd * (step / 2) * scale
    return torch.cat(list(parts.values()), dim=-1)
