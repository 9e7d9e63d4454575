# SPDX-License-Identifier: Apache-2.0
"""From packed codes to the odd integers that they stand for, in the dtype of the tensor cores.

Plain Triton turns every code into an integer and converts it, at ten instructions per code and more: then a tier of 4
bits takes longer to unpack than to read. On CUDA two words are unpacked together, in place: a code of b bits that lies
s bits above the end of a mantissa of M bits, below the exponent of 2^(M + 1 - s), is the number 2^(M + 1 - s) + 2 code,
the odd integer and an excess. Values are rid of it at once, exactly; for keys it is the same in every token, so that
the sum of a query's coordinates times their excess is taken off its scores. A shift serves as many codes as the
mantissa has room for: a code takes 0.6 to 1.5 instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mkv_kernels import codes

SCALE_SHIFT = tl.constexpr(codes.SCALE_SHIFT)
NAN_CODE = tl.constexpr(codes.NAN_CODE)
HALF_A_SCALE = tl.constexpr(1 << (codes.SCALE_SHIFT - 1))


@triton.constexpr_function
def _place(width: int, part: int, half: bool) -> tuple[int, int, int]:
    """Of a part that fits in a mantissa: how far words are shifted down, where the code then begins, and the exponent
    that it is put below. It begins at bit 1 at least, so that the odd integer and its excess fit the mantissa."""
    mantissa = 10 if half else 7
    per_shift = (mantissa - 1 - width) // width + 1
    begin = 1 + part % per_shift * width
    return part // per_shift * per_shift * width - 1, begin, mantissa + 1 - begin


@triton.constexpr_function
def excess(width: int, part: int, half: bool) -> int:
    """What `raised` integers have more than the odd ones; 0 for 8 bits in bfloat16, whose mantissa has 7."""
    return 0 if width == 8 and not half else (1 << _place(width, part, half)[2]) + (1 << width) - 1


@triton.constexpr_function
def excess_of(width: int, part: int, dtype: tl.dtype) -> int:
    """See `excess`; float32 has none, whose products are not to be rounded more than they are."""
    return 0 if dtype == tl.float32 else excess(width, part, dtype == tl.float16)


@triton.constexpr_function
def ptx(width: int, part: int, half: bool, raised: bool) -> str:
    """Unpacks one part of the two words in $1 to two numbers in $0; `half` is float16, else bfloat16."""
    dtype, mantissa, bias = ("f16x2", 10, 15) if half else ("bf16x2", 7, 127)

    def twice(bits: int) -> str:
        return f"0x{bits << 16 | bits:08x}"

    def power(exponent: int) -> int:
        return bias + exponent << mantissa

    def number(integer: int) -> str:
        """Bits of an integer that the mantissa holds."""
        size = abs(integer).bit_length() - 1
        below = (abs(integer) << mantissa >> size) - (1 << mantissa)
        return twice((0x8000 if integer < 0 else 0) | power(size) | below)

    def shifted(bits: int) -> str:
        return f"shl.b32 t, $1, {-bits};" if bits < 0 else f"shr.b32 t, $1, {bits};"

    lines = [".reg .b32 t, u, v, w;"]
    if width < mantissa:
        shift, begin, exponent = _place(width, part, half)
        lines.append(shifted(shift))
        to = "$0" if raised else "t"
        lines.append(f"lop3.b32 {to}, t, {twice((1 << width) - 1 << begin)}, {twice(power(exponent))}, 0xea;")
        if not raised:
            lines.append(f"mov.b32 u, {twice(power(0))}; mov.b32 v, {number(-excess(width, part, half))};")
            lines.append(f"fma.rn.{dtype} $0, t, u, v;")
    else:
        # 8 bits, of which the mantissa has 7: these become 1 to 255, and the highest, in the exponent, -256 or 0.
        lines.append(shifted(part * width))
        lines.append(f"lop3.b32 u, t, {twice(0x7F)}, {twice(power(8))}, 0xea;")
        lines.append(f"lop3.b32 v, t, {twice(0x80)}, {twice(power(7))}, 0xea;")
        lines.append(f"mov.b32 w, {twice(power(0))}; mov.b32 t, {number(-255)}; fma.rn.{dtype} u, u, w, t;")
        lines.append(f"mov.b32 w, {twice(power(1))}; mov.b32 t, {number(-512)}; fma.rn.{dtype} v, v, w, t;")
        lines.append(f"mov.b32 w, {twice(power(0))}; fma.rn.{dtype} $0, u, w, v;")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def unpacked(
    packed, PART: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr, RAISED: tl.constexpr
):
    """Odd integers of the codes in one part of packed words (see `codes`), or with their excess; exact in DTYPE."""
    if PTX:
        numbers = tl.inline_asm_elementwise(
            ptx(WIDTH, PART, tl.float16 == DTYPE, RAISED), "=r,r", [packed], dtype=DTYPE.value, is_pure=True, pack=2
        )
    else:
        less: tl.constexpr = (1 << WIDTH) - 1 - (excess_of(WIDTH, PART, DTYPE) if RAISED else 0)
        numbers = (((packed >> (PART * WIDTH)) & ((1 << WIDTH) - 1)) * 2 - less).to(DTYPE)
    return numbers


@triton.jit
def shifted(packed, bits, PTX: tl.constexpr):
    """Words shifted down by `bits`, of which two neighbours in memory have the same; above may be anything."""
    if PTX:
        packed = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, $2;", "=r,r,r,r", [packed, bits], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        packed = (packed.to(tl.int32) >> bits).to(tl.int16)
    return packed


@triton.jit
def scale_codes(scales):
    """See `codes.scale_codes`: float32 between the least and the largest scale, or none, to uint8."""
    bits = scales.to(tl.float16).to(tl.int16, bitcast=True)
    code = (bits + HALF_A_SCALE) >> SCALE_SHIFT
    return tl.where(scales == scales, code, NAN_CODE).to(tl.uint8)


@triton.jit
def scale_values(stored):
    """See `codes.scale_values`: the lowest byte of an integer to float32; 0 is worth 0."""
    return ((stored.to(tl.int32) & 0xFF) << SCALE_SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
