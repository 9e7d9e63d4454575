# SPDX-License-Identifier: Apache-2.0
"""What the decode kernel does to vectors, as functions that numba code calls with addresses.

scores     s[row, token] = sum_r q[row, r] k[token, r]           rows of a tile, 4 tokens
cap        s[token] = c tanh(s[token] a)                         of one row
weights    p[token] = 2^((s[token] - maximum) factor)            of one row; and times the values' token scales
weigh      o[row, r] += sum_token p[row, token] v[token, r]      rows of a tile, up to 64 coordinates
lift       out[c] = sum_r o[r] D[r, c] + mean[c]                 of one row
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from mkv_kernels.compiled.vector import (
    BFLOATS,
    F32,
    FLOATS,
    I32,
    I64,
    ITEMSIZE,
    LANES,
    NUMBER,
    PAIRS,
    UNIT,
    Sums,
    call,
    code_operands,
    constant,
    exp2,
    fma,
    interleaved,
    lane_sums,
    load,
    load_bytes,
    load_numbers,
    load_operands,
    multiply_add,
    shuffle,
    splat,
    steps,
    store,
    unit_mask,
)


def lengths(number: int) -> tuple[int, ...]:
    """A number that code is compiled for, as numba passes one on: it compiles functions for types of arguments, and the
    length of a tuple is in its type."""
    return (0,) * number


TOKENS = 4
"""Of a tile of scores: with 4 rows, 16 sums."""
SIDE_FIELDS = 9
"""Of one side of a latent group: offset and coordinates of the 16-bit tier; offset and bytes per token of the tiers of
8, 4 and 2 bits; offset of the scales, or -1. Offsets are those in a page."""
EXACT_PAIR, EXACT, EXACT_HALF, NIBBLES, LOW_PARTS, HIGH_PARTS = (lengths(number) for number in range(1, 7))
"""What `weigh` adds up: two units, one, or half of one of the 16-bit tier; the two parts of a unit of 4-bit codes, or
of the halves of 8-bit ones; the first two or the last two parts of a unit of 2-bit codes."""


def operand_bytes(kind: int) -> int:
    """Of a unit of q'."""
    return UNIT * (2 if kind == PAIRS else 4)


def _numbers(*arguments: Any) -> list[int]:
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


int64s, int32s, floats, uint8s = (pointer_to(t) for t in (types.int64, types.int32, types.float32, types.uint8))


@njit
def coordinate_of(byte: Any, part: Any, num_bytes: Any, parts: Any) -> Any:
    """Of a tier's coordinates, the one whose code is part `part` of the `parts` in a byte; see `codes`."""
    return (byte % 2 * parts + part) * (num_bytes // 2) + byte // 2


@intrinsic
def fetch_add(typingctx: Any, address: Any) -> Any:
    """Adds 1 to a number that threads share, and returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], I64.as_pointer()), I64(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def load_number(typingctx: Any, address: Any, kind: Any) -> Any:
    """A number of the model's dtype."""
    literals = _numbers(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = load(builder, NUMBER[literals[0]], arguments[0])
        return builder.fpext(number, F32) if ITEMSIZE[literals[0]] == 2 else number

    return types.float32(types.int64, kind), codegen


@intrinsic
def store_number(typingctx: Any, address: Any, number: Any, kind: Any) -> Any:
    """The float nearest to `number` in the model's dtype."""
    literals = _numbers(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store(builder, _rounded(builder, arguments[1], literals[0]), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, kind), codegen


def _rounded(builder: Any, x: Any, kind: int) -> Any:
    if ITEMSIZE[kind] == 4:
        return x
    return builder.fptrunc(x, ir.VectorType(NUMBER[kind], LANES) if isinstance(x.type, ir.VectorType) else NUMBER[kind])


@intrinsic
def scores(
    typingctx: Any, q: Any, pages: Any, slots: Any, side: Any, scales: Any, out: Any, stride: Any, rows: Any, kind: Any
) -> Any:
    """Scores of `rows` query heads against 4 tokens.

    Addresses: q, operands [units, rows]; pages and slots, int64 of the tokens; side, its fields; scales, floats of the
    tokens; out, floats, rows `stride` bytes apart.
    """
    num_rows, number = _numbers(rows, kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, pages, slots, side, scales, out, stride = arguments[:7]
        page, slot = ([load(builder, I64, x, 8 * token) for token in range(TOKENS)] for x in (pages, slots))
        sums = Sums(builder, num_rows * TOKENS)
        q_here = cgutils.alloca_once_value(builder, q)

        def rows_of(offset: Any, bytes_per_token: Any) -> list[Any]:
            return [
                builder.add(builder.add(page[token], offset), builder.mul(slot[token], bytes_per_token))
                for token in range(TOKENS)
            ]

        def add(k: list[list[Any]], count: int = UNIT) -> None:
            here = builder.load(q_here)
            for row in range(num_rows):
                offset = I64(row * operand_bytes(number))
                for i, q_i in enumerate(load_operands(builder, number, builder.add(here, offset), count)):
                    for token in range(TOKENS):
                        total = row * TOKENS + token
                        sums[total] = multiply_add(builder, number, sums[total], q_i, k[token][i])
            builder.store(builder.add(here, I64(num_rows * operand_bytes(number))), q_here)

        def add_codes(fields: Any, width: int, parts: int) -> None:
            num_bytes = load(builder, I64, fields, 8)
            codes = rows_of(load(builder, I64, fields), num_bytes)
            with steps(builder, builder.lshr(builder.add(num_bytes, I64(UNIT - 1)), I64(5))) as unit:
                offset = builder.shl(unit, I64(5))
                mask = unit_mask(builder, builder.sub(num_bytes, offset))
                packed = [load_bytes(builder, builder.add(row, offset), mask) for row in codes]
                for part in range(parts):
                    add([code_operands(builder, number, x, width, part) for x in packed])

        with steps(builder, I64(2)) as tier:
            add_codes(builder.add(side, builder.add(I64(16), builder.shl(tier, I64(4)))), 4, 2)
        add_codes(builder.add(side, I64(48)), 2, 4)
        with builder.if_then(builder.icmp_signed(">=", load(builder, I64, side, 64), I64(0))):
            for token in range(TOKENS):
                scale = splat(builder, load(builder, F32, scales, 4 * token))
                for row in range(num_rows):
                    sums[row * TOKENS + token] = builder.fmul(sums[row * TOKENS + token], scale)
        size = load(builder, I64, side, 8)
        exact = rows_of(load(builder, I64, side), builder.mul(size, I64(ITEMSIZE[number])))
        with steps(builder, builder.lshr(size, I64(5))) as unit:
            offset = builder.mul(unit, I64(UNIT * ITEMSIZE[number]))
            add([load_numbers(builder, number, builder.add(row, offset)) for row in exact])
        with builder.if_then(builder.icmp_signed("!=", builder.and_(size, I64(LANES)), I64(0))):
            offset = builder.mul(builder.sub(size, I64(LANES)), I64(ITEMSIZE[number]))
            add([load_numbers(builder, number, builder.add(row, offset), LANES) for row in exact], LANES)
        found = lane_sums(builder, [sums[i] for i in range(num_rows * TOKENS)])
        for row in range(num_rows):
            part = shuffle(builder, found, found, range(row * TOKENS, (row + 1) * TOKENS))
            store(builder, part, builder.add(out, builder.mul(stride, I64(row))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, rows, kind), codegen


@intrinsic
def largest(typingctx: Any, address: Any, count: Any) -> Any:
    """Of `count` times 16 floats."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = cgutils.alloca_once_value(builder, constant(FLOATS, float("-inf")))
        with steps(builder, arguments[1]) as i:
            x = load(builder, FLOATS, builder.add(arguments[0], builder.shl(i, I64(6))))
            builder.store(call(builder, "llvm.maxnum.v16f32", FLOATS, builder.load(found), x), found)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, builder.load(found))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def cap(typingctx: Any, scores: Any, count: Any, into: Any, out_of: Any) -> Any:
    """`count` times 16 scores x of a row become out_of tanh(x into ln(2) / 2)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count = arguments[:2]
        down, out_of = splat(builder, builder.fneg(arguments[2])), splat(builder, arguments[3])
        one = constant(FLOATS, 1.0)
        with steps(builder, count) as i:
            address = builder.add(scores, builder.shl(i, I64(6)))
            x = load(builder, FLOATS, address)
            # Of at most 1, so that nothing overflows.
            e = exp2(builder, builder.fmul(call(builder, "llvm.fabs.v16f32", FLOATS, x), down))
            t = builder.fdiv(builder.fsub(one, e), builder.fadd(one, e))
            t = call(builder, "llvm.copysign.v16f32", FLOATS, builder.fmul(t, out_of), x)
            store(builder, t, address)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def weights(
    typingctx: Any,
    scores: Any,
    count: Any,
    maximum: Any,
    factor: Any,
    scales: Any,
    exact: Any,
    coded: Any,
    kind: Any,
) -> Any:
    """Weights of `count` times 16 scores of a row, to `exact`, and times `scales` to `coded`; returns their sum.

    Weights are operands of `weigh`: bfloat16 for PAIRS, floats otherwise.
    """
    literals = _numbers(kind)
    kept = literals[0] if literals[0] == PAIRS else 0

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, maximum, factor, scales, exact, coded = arguments[:7]
        maximum, factor = splat(builder, maximum), splat(builder, factor)
        sums = Sums(builder, 1)
        with steps(builder, count) as i:
            offset, kept_offset = builder.shl(i, I64(6)), builder.mul(i, I64(LANES * ITEMSIZE[kept]))
            x = load(builder, FLOATS, builder.add(scores, offset))
            p = exp2(builder, builder.fmul(builder.fsub(x, maximum), factor))
            sums[0] = builder.fadd(sums[0], p)
            store(builder, _rounded(builder, p, kept), builder.add(exact, kept_offset))
            p = builder.fmul(p, load(builder, FLOATS, builder.add(scales, offset)))
            store(builder, _rounded(builder, p, kept), builder.add(coded, kept_offset))
        total = lane_sums(builder, [sums[0]])
        return builder.extract_element(total, I32(0))

    floats_, ints = types.float32, types.int64
    return types.float32(ints, ints, floats_, floats_, ints, ints, ints, kind), codegen


@intrinsic
def weigh(
    typingctx: Any,
    out: Any,
    weights: Any,
    stride: Any,
    pages: Any,
    slots: Any,
    num_tokens: Any,
    offset: Any,
    bytes_per_token: Any,
    remaining: Any,
    form: Any,
    rows: Any,
    kind: Any,
) -> Any:
    """Adds values of `num_tokens` tokens, weighted by `rows` query heads, to `out`, floats [units, rows, 32].

    Args:
        weights: address of the first row's, rows `stride` bytes apart; for an odd number of tokens, one 0 more.
        pages, slots: addresses of int64; for an odd number of tokens, one more that may be read.
        offset: in a page, of the unit of its first token.
        remaining: bytes from there to the end of the token's codes.
    """
    what, num_rows, number = _numbers(form, rows, kind)
    step = 2 if number == PAIRS else 1
    operands_per_unit = 1 if what == len(EXACT_HALF) and number != PAIRS else 2
    num_units = 1 if what in (len(EXACT), len(EXACT_HALF)) else 2

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, weights, stride, pages, slots, num_tokens, offset, bytes_per_token, remaining = arguments[:9]
        mask = unit_mask(builder, remaining)

        def units_of(token: Any) -> list[list[Any]]:
            at = builder.shl(token, I64(3))
            page, slot = (load(builder, I64, builder.add(x, at)) for x in (pages, slots))
            address = builder.add(builder.add(page, offset), builder.mul(slot, bytes_per_token))
            if what <= len(EXACT_HALF):
                count = LANES if what == len(EXACT_HALF) else UNIT
                return [
                    load_numbers(builder, number, builder.add(address, I64(i * UNIT * ITEMSIZE[number])), count)
                    for i in range(num_units)
                ]
            packed = load_bytes(builder, address, mask)
            width = 4 if what == len(NIBBLES) else 2
            first = 2 if what == len(HIGH_PARTS) else 0
            return [code_operands(builder, number, packed, width, part) for part in (first, first + 1)]

        def place(unit: int, row: int, i: int) -> int:
            return 4 * ((unit * num_rows + row) * UNIT + i * LANES)

        where = [
            (unit, row, i) for unit in range(num_units) for row in range(num_rows) for i in range(operands_per_unit)
        ]
        sums = Sums(builder, len(where))
        for index, at in enumerate(where):
            sums[index] = load(builder, FLOATS, out, place(*at))
        row_weights = [builder.add(weights, builder.mul(stride, I64(row))) for row in range(num_rows)]
        # An odd token more has no weight.
        count = builder.lshr(builder.add(num_tokens, I64(step - 1)), I64(step - 1))
        with steps(builder, count) as turn:
            token = builder.mul(turn, I64(step))
            units = units_of(token)
            if number == PAIRS:
                after = units_of(builder.add(token, I64(1)))
                units = [interleaved(builder, a[0], b[0]) for a, b in zip(units, after, strict=True)]
            at = builder.shl(turn, I64(2))
            if number == PAIRS:
                pairs = [splat(builder, load(builder, I32, builder.add(row, at))) for row in row_weights]
                p = [builder.bitcast(pair, BFLOATS) for pair in pairs]
            else:
                p = [splat(builder, load(builder, F32, builder.add(row, at))) for row in row_weights]
            for index, (unit, row, i) in enumerate(where):
                sums[index] = multiply_add(builder, number, sums[index], p[row], units[unit][i])
        for index, at in enumerate(where):
            store(builder, sums[index], out, place(*at))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, form, rows, kind), codegen


@intrinsic
def lift(typingctx: Any, o: Any, up: Any, rank: Any, stride: Any, mean: Any, out: Any, vectors: Any, kind: Any) -> Any:
    """`vectors` times 16 columns of o D + mean, in the model's dtype. Rows of D are `stride` bytes apart."""
    num_vectors, number = _numbers(vectors, kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        o, up, rank, stride, mean, out = arguments[:6]
        sums = Sums(builder, num_vectors)
        for i in range(num_vectors):
            sums[i] = load(builder, FLOATS, mean, 64 * i)
        with steps(builder, rank) as r:
            weight = splat(builder, load(builder, F32, builder.add(o, builder.shl(r, I64(2)))))
            row = builder.add(up, builder.mul(r, stride))
            for i in range(num_vectors):
                sums[i] = fma(builder, weight, load(builder, FLOATS, row, 64 * i), sums[i])
        for i in range(num_vectors):
            store(builder, _rounded(builder, sums[i], number), out, LANES * ITEMSIZE[number] * i)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, vectors, kind), codegen
