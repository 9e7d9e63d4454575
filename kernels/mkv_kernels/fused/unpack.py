# SPDX-License-Identifier: Apache-2.0
"""From packed codes to the odd integers that they stand for, in the dtype of the tensor cores.

Plain Triton turns every code into an integer and converts it, at ten instructions per code and more: then a tier of 4
bits takes longer to unpack than to read. On CUDA the codes of four bytes are unpacked together, with the bytes 0x43 in
front that make 128 + x of a small x in bfloat16 (0x64: 1024 + x in float16); what is too much is subtracted again,
exactly, at 1.5 instructions per code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mkv_kernels import codes

SCALE_SHIFT = tl.constexpr(codes.SCALE_SHIFT)
HALF_A_SCALE = tl.constexpr(1 << (codes.SCALE_SHIFT - 1))


@triton.constexpr_function
def ptx(width: int, part: int, half: bool) -> str:
    """Unpacks one part of the four bytes in $2 to two numbers each in $0 and $1; `half` is float16, else bfloat16."""
    dtype, above = ("f16x2", 0x64) if half else ("bf16x2", 0x43)
    one, two = (0x3C003C00, 0x40004000) if half else (0x3F803F80, 0x40004000)
    low, high = 0x4140, 0x4342  # bytes 0 and 1, or 2 and 3, each with `above` in front

    def both(number: int) -> str:
        return f"0x{number << 16 | number:08x}"

    lines = [".reg .b32 t, a, u, v, w;", f"mov.b32 a, 0x{above * 0x01010101:08x};"]
    if width < 8:
        # Twice the code, so that the subtraction leaves an odd integer.
        shift = part * width - 1
        lines.append("shl.b32 t, $2, 1;" if shift < 0 else f"shr.b32 t, $2, {shift};")
        lines.append(f"and.b32 t, t, 0x{(((1 << width) - 1) << 1) * 0x01010101:08x};")
        # -(128 + 15) for 4 bits in bfloat16, and so on.
        less = above << 8 | 0x8000 | ((1 << width) - 1)
        for to, bytes_ in (("$0", low), ("$1", high)):
            lines.append(f"prmt.b32 {to}, t, a, 0x{bytes_:04x};")
            lines.append(f"mov.b32 u, {both(less)}; mov.b32 v, 0x{one:08x};")
            lines.append(f"fma.rn.{dtype} {to}, {to}, v, u;")
    elif half:
        for to, bytes_ in (("$0", low), ("$1", high)):
            lines.append(f"prmt.b32 {to}, $2, a, 0x{bytes_:04x};")
            lines.append(f"mov.b32 u, {both(0xE400)}; mov.b32 v, 0x{one:08x};")
            lines.append(f"fma.rn.{dtype} {to}, {to}, v, u;")
            lines.append(f"mov.b32 u, {both(0xDBF8)}; mov.b32 v, 0x{two:08x};")
            lines.append(f"fma.rn.{dtype} {to}, {to}, v, u;")
    else:
        # Only 7 bits fit behind 128; where the eighth is set, 1 is added in place of -255.
        lines.append("and.b32 t, $2, 0x7f7f7f7f;")
        for to, bytes_, signs in (("$0", low, 0x9988), ("$1", high, 0xBBAA)):
            lines.append(f"prmt.b32 w, $2, $2, 0x{signs:04x};")
            lines.append(f"prmt.b32 {to}, t, a, 0x{bytes_:04x};")
            lines.append(f"mov.b32 u, {both(0xC300)}; mov.b32 v, 0x{one:08x};")
            lines.append(f"fma.rn.{dtype} {to}, {to}, v, u;")
            lines.append(f"mov.b32 u, {both(0x3F80)}; mov.b32 v, {both(0xC37F)};")
            lines.append("lop3.b32 w, w, u, v, 0xca;")
            lines.append(f"mov.b32 v, 0x{two:08x};")
            lines.append(f"fma.rn.{dtype} {to}, {to}, v, w;")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def odd_integers(packed, PART: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Odd integers of the codes in one part of packed bytes (see `codes`); exact in DTYPE up to 8 bits."""
    if PTX:
        odd = tl.inline_asm_elementwise(
            ptx(WIDTH, PART, tl.float16 == DTYPE), "=&r,=&r,r", [packed], dtype=DTYPE.value, is_pure=True, pack=4
        )
    else:
        codes = packed
        if WIDTH < 8:
            codes = (packed >> (PART * WIDTH)) & ((1 << WIDTH) - 1)
        odd = (codes.to(tl.int16) * 2 - ((1 << WIDTH) - 1)).to(DTYPE)
    return odd


@triton.jit
def scale_codes(scales):
    """See `codes.scale_codes`: float32 between the least and the largest scale to uint8."""
    bits = scales.to(tl.float16).to(tl.int16, bitcast=True)
    return ((bits + HALF_A_SCALE) >> SCALE_SHIFT).to(tl.uint8)


@triton.jit
def scale_values(stored):
    """See `codes.scale_values`: uint8 to float32; 0 is worth 0."""
    return (stored.to(tl.int16) << SCALE_SHIFT).to(tl.float16, bitcast=True).to(tl.float32)
