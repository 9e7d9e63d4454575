# SPDX-License-Identifier: Apache-2.0
"""Codes as signed bytes, and numbers of 16 bits as two of them: the operands of `integer`.

Codes are fields of a byte, taken where they lie, without shifts:

    low     byte & 0x0f              two codes of 2 bits, one of 4, or half of one of 8
    high    (byte & 0xf0) ^ 0x80     the same of the upper ones times 16, less 128, so that it is a signed byte
    first   byte & 0x03              where there are codes of 2 bits: the lower code of `low`
    third   byte & 0x30              and that of `high`

An odd integer is a sum of these times constants, and a constant: those are in the queries' weights and in what is taken
of accumulators at the end. Words of all tiers lie one after the other, and are taken from the last one on: those of 2
bits, which need all four fields, are then the first; tiles are full whatever the tiers' sizes.

Legend: R query rows. A "region" is a side's row of `table.regions`.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIGH = tl.constexpr(1)
"""The field that is more than masked."""
WORTH = tl.constexpr(1 / 32639)
"""Of one, where the largest number is 1: two signed bytes make up to 127 * 256 + 127."""
ROUNDER = tl.constexpr(12582912.0 + 128.0)
"""Added to a float32 of less than 2^22, rounds it, and leaves the integer, plus 128, in the lowest 16 bits."""

_MASKS = tl.constexpr((0x0F, -0x10, 0x03, 0x30))


@triton.constexpr_function
def bytes_ptx(half: int) -> str:
    """The same byte of four words, of which $1 and $2 have two each."""
    return f"prmt.b32 $0, $1, $2, {(0x6420, 0x7531)[half]:#x};"


@triton.constexpr_function
def field_ptx(field: int) -> str:
    """Of four bytes at once."""
    mask = (0x0F0F0F0F, 0xF0F0F0F0, 0x03030303, 0x30303030)[field]
    if field == 1:
        return f"lop3.b32 $0, $1, {mask:#x}, 0x80808080, 0x6a;"
    return f"and.b32 $0, $1, {mask:#x};"


@triton.jit
def bytes_of(words, HALF: tl.constexpr, PTX: tl.constexpr):
    """The lower or the upper bytes of words."""
    if PTX:
        halves = tl.inline_asm_elementwise(bytes_ptx(HALF), "=r,r,r", [words], dtype=tl.int8, is_pure=True, pack=4)
    else:
        halves = (words >> (8 * HALF)).to(tl.int8)
    return halves


@triton.jit
def field_of(codes, FIELD: tl.constexpr, PTX: tl.constexpr):
    """See the module's docstring; bytes to signed bytes."""
    if PTX:
        field = tl.inline_asm_elementwise(field_ptx(FIELD), "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    elif FIELD == HIGH:
        field = (codes & _MASKS[FIELD]) ^ -0x80
    else:
        field = codes & _MASKS[FIELD]
    return field


@triton.constexpr_function
def fields_of(quarters: int, tile: int) -> int:
    """How many fields a tile's bytes have, where so many of the first tiles have codes of 2 bits."""
    return 4 if tile < quarters else 2


@triton.jit
def rounded(x, by):
    """x by, rounded to integers between -32639 and 32639, as `bytes_of_numbers` and `whole` take them."""
    return x * by + ROUNDER


@triton.jit
def bytes_of_numbers(x):
    """Of `rounded`: the higher byte, and the lower one plus 128."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.join((bits >> 8).to(tl.int8), bits.to(tl.int8))


@triton.jit
def signed(pairs, low, OPAQUE: tl.constexpr):
    """`bytes_of_numbers` to signed bytes, 256 high + low; `low` is -128 at the lower ones, else 0.

    What was joined Triton takes for numbers of 4 bits, and loads 8 neighbours of the other operand for a thread. That
    is best where they are a word's tokens. Neighbouring words take four times as long then; for their sake OPAQUE hides
    what was joined, in PTX that claims to do more than it does.
    """
    if OPAQUE:
        pairs = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r", [pairs, low], dtype=tl.int8, is_pure=False, pack=4
        )
    else:
        pairs = pairs ^ low
    return pairs


@triton.jit
def low_bytes(R: tl.constexpr):
    return tl.where(tl.arange(0, 2 * R) % 2 == 1, -0x80, 0).to(tl.int8)


@triton.jit
def whole(x):
    return x - ROUNDER


@triton.jit
def joined(products, ROWS: tl.constexpr, R: tl.constexpr):
    """Products with such pairs of bytes, int32 [ROWS, 2 R] to float32 [ROWS, R]."""
    high, low = tl.split(tl.reshape(products, [ROWS, R, 2]))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def words_of(region):
    """Where a side's words begin in a page of words; how many there are of each tier; coordinates before them."""
    words_8, words_4, words_2 = tl.load(region + 3), tl.load(region + 5), tl.load(region + 7)
    at = tl.load(region + 6)
    at = tl.where(words_4 > 0, tl.load(region + 4), at)
    at = tl.where(words_8 > 0, tl.load(region + 2), at)
    return tl.multiple_of(at & 0x3FFFFFFF, 8), words_8, words_4, words_2, tl.load(region + 1)


@triton.jit
def words_in(TILE: tl.constexpr, WORDS: tl.constexpr):
    """Words of a tile, counted from a side's last one on; ascending as they lie in the page."""
    return TILE * WORDS + WORDS - 1 - tl.arange(0, WORDS)


@triton.jit
def tiers_of(word, region):
    """Of a side's words from the last one on: whether they are of 8, 4 and 2 bits."""
    _, words_8, words_4, words_2, _ = words_of(region)
    is_2 = word < words_2
    is_4 = (word < words_2 + words_4) & (word >= words_2)
    is_8 = (word < words_2 + words_4 + words_8) & (word >= words_2 + words_4)
    return is_8, is_4, is_2


@triton.jit
def coordinates_of(word, region, HALF: tl.constexpr, CODE: tl.constexpr):
    """Of a side's words from the last one on: coordinate of a byte's code, counted from the lowest, and whether it has
    so many."""
    _, words_8, words_4, words_2, exact = words_of(region)
    is_8, is_4, is_2 = tiers_of(word, region)
    place = words_8 + words_4 + words_2 - 1 - word
    col = exact + 2 * words_8 + 4 * words_4 + (4 * HALF + CODE) * words_2 + place - words_8 - words_4
    inside = is_2
    if CODE < 2:
        col = tl.where(is_4, exact + 2 * words_8 + (2 * HALF + CODE) * words_4 + place - words_8, col)
        inside = inside | is_4
    if CODE < 1:
        col = tl.where(is_8, exact + HALF * words_8 + place, col)
        inside = inside | is_8
    return col, inside
