# SPDX-License-Identifier: Apache-2.0
"""LLVM vectors of 16 floats and of 32 coordinates: loads, unpacking, products, sums.

A unit is 32 neighbouring coordinates of the 16-bit tier. Its operands are what one multiplication takes: two vectors of
16 floats, or, for `PAIRS`, one of 32 bfloat16 numbers, of which `multiply_add` sums neighbours. A strip is a word of
codes of 16 neighbouring tokens; an operand is one part of it, of 16 or, for pairs of tokens, two times 16 tokens, or
pairs of two parts of 16 tokens. Of 8 bits, two parts are a code's halves, of which the upper is worth 16 times the
lower: every part has 4 bits or 2.

LLVM makes of vectors what the processor has; with AVX-512 a vector is a register. Codes become floats without a
conversion: shifted to the top of the mantissa of 1.0 they are 1 + code / 2^b, and less a constant the odd integer times
2^-(b + 1), which queries and outputs make up for. bfloat16 has a table of 32 to look odd integers up in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

FLOAT32, FLOAT16, BFLOAT16, PAIRS = range(4)
"""Kinds of numbers: of the model's dtype. PAIRS is bfloat16 on processors that multiply it (AVX512-BF16)."""
ITEMSIZE = (4, 2, 2, 2)
LANES, UNIT = 16, 32


def processor_has(feature: str) -> bool:
    """By LLVM's name. Asked of numba, which compiles for this processor unless NUMBA_* variables say otherwise."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


MOST_SUMS = 16 if processor_has("avx512f") else 4
"""Vectors of 16 floats that a loop may add to. AVX-512 has 32 registers of that size; elsewhere such a vector takes two
or four of 16 or 32, and loops are cut."""


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
NUMBER = (F32, ir.HalfType(), _BFloat(), _BFloat())
FLOATS = ir.VectorType(F32, LANES)
BFLOATS = ir.VectorType(_BFloat(), UNIT)
WORDS = ir.VectorType(I16, UNIT)
STRIP = ir.VectorType(I16, LANES)

Value = Any
"""An LLVM value; addresses are 64-bit integers."""


def load(builder: Any, type_: Any, address: Value, offset: int = 0) -> Value:
    if offset:
        address = builder.add(address, I64(offset))
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)


def store(builder: Any, value: Value, address: Value, offset: int = 0) -> None:
    if offset:
        address = builder.add(address, I64(offset))
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def shuffle(builder: Any, a: Value, b: Value, lanes: Sequence[int]) -> Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes]))


def splat(builder: Any, scalar: Value, count: int = LANES) -> Value:
    vector = ir.VectorType(scalar.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return shuffle(builder, one, one, [0] * count)


def call(builder: Any, name: str, result: Any, *arguments: Value) -> Value:
    """An intrinsic of LLVM."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [argument.type for argument in arguments]), name
    )
    return builder.call(function, arguments)


@contextmanager
def steps(builder: Any, count: Value) -> Iterator[Value]:
    with cgutils.for_range(builder, count) as loop:
        yield loop.index


class Sums:
    """Vectors of 16 floats that a loop adds to. LLVM keeps them in registers, if they are `MOST_SUMS` at most."""

    def __init__(self, builder: Any, count: int) -> None:
        self.builder = builder
        self.slots = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
        for slot in self.slots:
            builder.store(constant(FLOATS, 0.0), slot)

    def __getitem__(self, index: int) -> Value:
        return self.builder.load(self.slots[index])

    def __setitem__(self, index: int, value: Value) -> None:
        self.builder.store(value, self.slots[index])


def loops_of(items: Sequence[Any], sums_per_item: int) -> list[Sequence[Any]]:
    """Items by the loop that adds to their sums."""
    at_once = max(1, MOST_SUMS // sums_per_item)
    return [items[first : first + at_once] for first in range(0, len(items), at_once)]


def fma(builder: Any, a: Value, b: Value, c: Value) -> Value:
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


def multiply_add(builder: Any, kind: int, total: Value, a: Value, b: Value) -> Value:
    if kind != PAIRS:
        return fma(builder, a, b, total)
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a, b)


def _halves(builder: Any, floats: Value) -> list[Value]:
    if floats.type.count == LANES:
        return [floats]
    return [shuffle(builder, floats, floats, range(first, first + LANES)) for first in (0, LANES)]


def load_numbers(builder: Any, kind: int, address: Value, count: int = UNIT) -> list[Value]:
    """Operands of a unit of numbers, or of its first half; of PAIRS the other half is 0."""
    if kind != PAIRS:
        numbers = load(builder, ir.VectorType(NUMBER[kind], count), address)
        if kind == FLOAT32:
            return _halves(builder, numbers)
        return _halves(builder, builder.fpext(numbers, ir.VectorType(F32, count)))
    words = load(builder, ir.VectorType(I16, count), address)
    if count < UNIT:
        words = shuffle(builder, words, constant(words.type, 0), range(UNIT))
    return [builder.bitcast(words, BFLOATS)]


def load_operands(builder: Any, kind: int, address: Value, count: int = UNIT) -> list[Value]:
    """Operands of a unit that is kept as operands: bfloat16 for PAIRS, floats otherwise."""
    return load_numbers(builder, PAIRS if kind == PAIRS else FLOAT32, address, UNIT if kind == PAIRS else count)


def load_strip(builder: Any, address: Value) -> Value:
    """A word of each of 16 tokens."""
    return load(builder, STRIP, address)


def odd_floats(builder: Any, strip: Value, width: int, part: int) -> Value:
    """Odd integers of one part of 16 words, times `code_factor`."""
    ints, mask = ir.VectorType(I32, LANES), (1 << width) - 1
    code = builder.shl(builder.zext(strip, ints), constant(ints, 23 - width - part * width))
    code = builder.and_(code, constant(ints, mask << (23 - width)))
    floats = builder.bitcast(builder.or_(code, constant(ints, 0x3F800000)), FLOATS)
    return builder.fsub(floats, constant(FLOATS, 1 + mask / (2 << width)))


def token_pairs(builder: Any, strip: Value, after: Value, width: int, part: int) -> Value:
    """Odd integers of one part of 32 words, of tokens that follow one another."""
    return _odd_integers(builder, shuffle(builder, strip, after, range(UNIT)), width, [part])


def twice(builder: Any, strip: Value) -> Value:
    """Every word beside itself."""
    return shuffle(builder, strip, strip, [lane // 2 for lane in range(UNIT)])


def part_pairs(builder: Any, words: Value, width: int, part: int) -> Value:
    """Of words that are there `twice`: the odd integers of a part and of the next."""
    return _odd_integers(builder, words, width, [part, part + 1])


def _odd_integers(builder: Any, words: Value, width: int, parts: Sequence[int]) -> Value:
    """Of 32 words; their parts alternate."""
    shifts = [I16(part * width) for part in parts] * (UNIT // len(parts))
    if any(parts):
        words = builder.lshr(words, ir.Constant(WORDS, shifts))
    mask = (1 << width) - 1
    # The look-up takes the lowest 5 bits, so the table repeats itself for those that are not the code's.
    table = ir.Constant(WORDS, [I16(_bfloat16(2 * (index & mask) - mask)) for index in range(32)])
    return builder.bitcast(call(builder, "llvm.x86.avx512.permvar.hi.512", WORDS, table, words), BFLOATS)


def code_factor(kind: int, width: int) -> float:
    return 1.0 if kind == PAIRS else 0.5 / (1 << width)


def _bfloat16(odd: int) -> int:
    """Bits of an odd integer of less than 8 bits."""
    size = abs(odd).bit_length() - 1
    return (0x8000 if odd < 0 else 0) | (127 + size) << 7 | (abs(odd) << (7 - size)) & 0x7F


def lane_sums(builder: Any, vectors: Sequence[Value]) -> Value:
    """Sums over the lanes of up to 16 vectors, a power of two of them: lane i has that of vector i mod their number."""
    found, lanes = list(vectors), LANES
    while lanes > len(vectors):
        # Halves are registers of their own, or parts that cost nothing to take.
        lanes //= 2
        halves = [[shuffle(builder, x, x, range(at, at + lanes)) for at in (0, lanes)] for x in found]
        found = [builder.fadd(lower, upper) for lower, upper in halves]
    block = 1
    while len(found) > 1:
        first = [i // (2 * block) * 2 * block + i % block + (lanes if i & block else 0) for i in range(lanes)]
        found = [
            builder.fadd(shuffle(builder, a, b, first), shuffle(builder, a, b, [lane + block for lane in first]))
            for a, b in zip(found[::2], found[1::2], strict=True)
        ]
        block *= 2
    return shuffle(builder, found[0], found[0], [i % lanes for i in range(LANES)])


def interleaved(builder: Any, a: Value, b: Value) -> list[Value]:
    """Pairs of a coordinate of two tokens, in the order of `place_in_unit`: two operands of PAIRS."""
    lanes = range(UNIT)
    # Within 128 bits alike, as the processor's own interleaving is.
    low = [8 * (i // 8) + i % 8 // 2 + (UNIT if i % 2 else 0) for i in lanes]
    return [shuffle(builder, a, b, [lane + half for lane in low]) for half in (0, 4)]


def exp2(builder: Any, x: Value) -> Value:
    """2^x for x of at most 0, 0 below 2^-126: a polynomial of degree 6 about the nearest integer."""
    least = constant(FLOATS, -126.0)
    small = builder.fcmp_ordered("<", x, least)
    x = builder.select(small, least, x)
    whole = call(builder, "llvm.rint.v16f32", FLOATS, x)
    rest = builder.fsub(x, whole)
    # ln(2)^i / i!, good to 1e-7 for arguments within a half.
    y = constant(FLOATS, 1.5403530393381609e-4)
    for c in (
        1.3333558146428443e-3,
        9.618129107628477e-3,
        5.550410866482158e-2,
        0.24022650695910072,
        0.6931471805599453,
    ):
        y = fma(builder, y, rest, constant(FLOATS, c))
    y = fma(builder, y, rest, constant(FLOATS, 1.0))
    ints = ir.VectorType(I32, LANES)
    exponent = builder.shl(builder.add(builder.fptosi(whole, ints), constant(ints, 127)), constant(ints, 23))
    y = builder.fmul(y, builder.bitcast(exponent, FLOATS))
    return builder.select(small, constant(FLOATS, 0.0), y)
