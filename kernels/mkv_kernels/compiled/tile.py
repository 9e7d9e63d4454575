# SPDX-License-Identifier: Apache-2.0
"""What the inner loops share: sizes of tiles, fields of a side, addresses as pointers, and single numbers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.extending import intrinsic

from mkv_kernels.compiled.vector import (
    BFLOAT16,
    F32,
    I16,
    I32,
    I64,
    ITEMSIZE,
    LANES,
    MOST_SUMS,
    NUMBER,
    PAIRS,
    STRIP,
    UNIT,
    constant,
    load,
    store,
)


def lengths(number: int) -> tuple[int, ...]:
    """A number that code is compiled for, as numba passes one on: it compiles functions for types of arguments, and the
    length of a tuple is in its type."""
    return (0,) * number


ROWS = 4
"""Query heads of a tile."""
TOKENS = MOST_SUMS // ROWS
"""Of a tile of scores."""
STRIPS = MOST_SUMS // ROWS
"""Of 16 tokens, of a tile of scores of codes."""
SIDE_FIELDS = 9
"""Of one side of a latent group: offset and coordinates of the 16-bit tier; offset and words per token of the tiers of
8, 4 and 2 bits; offset of the scales, or -1. Offsets are those in a page, in bytes."""
PARTS = (4, 4, 8)
"""Of a word of 8, 4 and 2 bits, those of 8 in halves."""


def operand_bytes(kind: int) -> int:
    """Of a unit of q'."""
    return UNIT * (2 if kind == PAIRS else 4)


def numbers_of(*arguments: Any) -> list[int]:
    """Of types of `lengths`."""
    return [len(argument) for argument in arguments]


def pointer_to(element: Any) -> Any:
    """A function that makes an address a pointer."""

    @intrinsic
    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return cast


int64s, int32s, int16s, floats, uint8s = (
    pointer_to(t) for t in (types.int64, types.int32, types.int16, types.float32, types.uint8)
)


@njit
def coordinate_of(tier: Any, word: Any, part: Any, num_words: Any) -> Any:
    """Of a tier's coordinates, the one whose code, or half of it, is part `part` of the `PARTS` of a word."""
    return word + (part // 2 if tier == 0 else part) * num_words


@intrinsic
def fetch_add(typingctx: Any, address: Any) -> Any:
    """Adds 1 to a number that threads share, and returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], I64.as_pointer()), I64(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def load_number(typingctx: Any, address: Any, kind: Any) -> Any:
    """A number of the model's dtype."""
    literals = numbers_of(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = load(builder, NUMBER[literals[0]], arguments[0])
        return builder.fpext(number, F32) if ITEMSIZE[literals[0]] == 2 else number

    return types.float32(types.int64, kind), codegen


@intrinsic
def store_number(typingctx: Any, address: Any, number: Any, kind: Any) -> Any:
    """The float nearest to `number` in the model's dtype."""
    literals = numbers_of(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store(builder, rounded(builder, arguments[1], literals[0]), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, kind), codegen


def rounded(builder: Any, x: Any, kind: int) -> Any:
    """Floats, one or `LANES`, as the nearest numbers of a dtype; bfloat16 as words of 16 bits but for `PAIRS`."""
    if ITEMSIZE[kind] == 4:
        return x
    is_vector = isinstance(x.type, ir.VectorType)
    if kind != BFLOAT16:
        return builder.fptrunc(x, ir.VectorType(NUMBER[kind], LANES) if is_vector else NUMBER[kind])
    # Where a processor cannot, LLVM calls a function of the C compiler's library, which not every system has.
    longs, words = (ir.VectorType(I32, LANES), STRIP) if is_vector else (I32, I16)

    def number(value: int) -> Any:
        return constant(longs, value) if is_vector else I32(value)

    bits = builder.bitcast(x, longs)
    upper = builder.lshr(bits, number(16))
    to_even = builder.add(builder.and_(upper, number(1)), number(0x7FFF))
    nearest = builder.lshr(builder.add(bits, to_even), number(16))
    quiet = builder.or_(upper, number(0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", x, x), quiet, nearest), words)
