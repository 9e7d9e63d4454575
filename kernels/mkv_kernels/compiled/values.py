# SPDX-License-Identifier: Apache-2.0
"""What the decode kernel does with values, as functions that numba code calls with addresses.

weights       p[token] = 2^((s[token] - maximum) factor)         of one row; and times the values' token scales
weigh_codes   o[row, r] += sum_token p[row, token] v[token, r]   rows of a tile, 4 parts of a word
weigh         the same                                           rows of a tile, up to 64 coordinates of 16 bits
lift          out[c] = sum_r o[r] D[r, c] + mean[c]              of one row
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.core.extending import intrinsic

from mkv_kernels.compiled.tile import lengths, numbers_of, rounded
from mkv_kernels.compiled.vector import (
    BFLOATS,
    F32,
    FLOATS,
    I32,
    I64,
    ITEMSIZE,
    LANES,
    PAIRS,
    UNIT,
    Sums,
    exp2,
    fma,
    interleaved,
    lane_sums,
    load,
    load_numbers,
    load_operands,
    load_strip,
    loops_of,
    multiply_add,
    odd_floats,
    splat,
    steps,
    store,
    token_pairs,
)

EXACT_PAIR, EXACT, EXACT_HALF = (lengths(number) for number in range(1, 4))
"""What `weigh` adds up: two units, one, or half of one."""
NIBBLES, LOW_PARTS, HIGH_PARTS = (lengths(number) for number in range(1, 4))
"""What `weigh_codes` adds up: all parts of words of 4 bits, or of 8 in halves; the lower or upper ones of 2 bits."""


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
    literals = numbers_of(kind)
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
            store(builder, rounded(builder, p, kept), builder.add(exact, kept_offset))
            p = builder.fmul(p, load(builder, FLOATS, builder.add(scales, offset)))
            store(builder, rounded(builder, p, kept), builder.add(coded, kept_offset))
        total = lane_sums(builder, [sums[0]])
        return builder.extract_element(total, I32(0))

    floats_, ints = types.float32, types.int64
    return types.float32(ints, ints, floats_, floats_, ints, ints, ints, kind), codegen


@intrinsic
def weigh_codes(
    typingctx: Any,
    out: Any,
    weights: Any,
    stride: Any,
    strips: Any,
    num_turns: Any,
    offset: Any,
    form: Any,
    rows: Any,
    kind: Any,
) -> Any:
    """Adds 4 parts of a word of tokens, weighted by `rows` query heads, to `out`, floats [16], of which 4 times `rows`
    count.

    Args:
        weights: address of the first row's, rows `stride` bytes apart.
        strips: address of int64, where the first word of 16 tokens would lie in their page.
        num_turns: of 16 tokens, or 32 for PAIRS; there are as many weights and strips.
        offset: of the word in a page, in bytes.
    """
    what, num_rows, number = numbers_of(form, rows, kind)
    width, first_part = (4 if what == len(NIBBLES) else 2), (4 if what == len(HIGH_PARTS) else 0)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, weights, stride, strips, num_turns, offset = arguments[:6]
        row_weights = [builder.add(weights, builder.mul(stride, I64(row))) for row in range(num_rows)]
        sums = Sums(builder, 4 * num_rows)
        for parts in loops_of(range(4), num_rows):
            with steps(builder, num_turns) as turn:
                p = [
                    load_operands(builder, number, builder.add(row, builder.shl(turn, I64(6))), LANES)[0]
                    for row in row_weights
                ]
                at = builder.add(strips, builder.shl(turn, I64(4 if number == PAIRS else 3)))
                strip = load_strip(builder, builder.add(load(builder, I64, at), offset))
                if number == PAIRS:
                    after = load_strip(builder, builder.add(load(builder, I64, at, 8), offset))
                for part in parts:
                    if number == PAIRS:
                        v = token_pairs(builder, strip, after, width, first_part + part)
                    else:
                        v = odd_floats(builder, strip, width, first_part + part)
                    for row in range(num_rows):
                        total = part * num_rows + row
                        sums[total] = multiply_add(builder, number, sums[total], p[row], v)
        found = lane_sums(builder, [sums[i] for i in range(4 * num_rows)])
        store(builder, builder.fadd(load(builder, FLOATS, out), found), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, form, rows, kind), codegen


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
    form: Any,
    rows: Any,
    kind: Any,
) -> Any:
    """Adds values of the 16-bit tier of `num_tokens` tokens, weighted by `rows` query heads, to `out`, floats
    [units, rows, 32].

    Args:
        weights: address of the first row's, rows `stride` bytes apart; for an odd number of tokens, one 0 more.
        pages, slots: addresses of int64; for an odd number of tokens, one more that may be read.
        offset: in a page, of the unit of its first token.
    """
    what, num_rows, number = numbers_of(form, rows, kind)
    step = 2 if number == PAIRS else 1
    operands_per_unit = 1 if what == len(EXACT_HALF) and number != PAIRS else 2
    num_units, count_ = (2 if what == len(EXACT_PAIR) else 1), (LANES if what == len(EXACT_HALF) else UNIT)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, weights, stride, pages, slots, num_tokens, offset, bytes_per_token = arguments[:8]

        def units_of(token: Any) -> list[list[Any]]:
            at = builder.shl(token, I64(3))
            page, slot = (load(builder, I64, builder.add(x, at)) for x in (pages, slots))
            address = builder.add(builder.add(page, offset), builder.mul(slot, bytes_per_token))
            return [
                load_numbers(builder, number, builder.add(address, I64(i * UNIT * ITEMSIZE[number])), count_)
                for i in range(num_units)
            ]

        def place(unit: int, row: int, i: int) -> int:
            return 4 * ((unit * num_rows + row) * UNIT + i * LANES)

        places = [(unit, i) for unit in range(num_units) for i in range(operands_per_unit)]
        where = [(unit, row, i) for unit, i in places for row in range(num_rows)]
        row_weights = [builder.add(weights, builder.mul(stride, I64(row))) for row in range(num_rows)]
        # An odd token more has no weight.
        count = builder.lshr(builder.add(num_tokens, I64(step - 1)), I64(step - 1))
        for together in loops_of(where, 1):
            sums = Sums(builder, len(together))
            for index, at in enumerate(together):
                sums[index] = load(builder, FLOATS, out, place(*at))
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
                for index, (unit, row, i) in enumerate(together):
                    sums[index] = multiply_add(builder, number, sums[index], p[row], units[unit][i])
            for index, at in enumerate(together):
                store(builder, sums[index], out, place(*at))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, form, rows, kind), codegen


@intrinsic
def lift(typingctx: Any, o: Any, up: Any, rank: Any, stride: Any, mean: Any, out: Any, vectors: Any, kind: Any) -> Any:
    """`vectors` times 16 columns of o D + mean, in the model's dtype. Rows of D are `stride` bytes apart."""
    num_vectors, number = numbers_of(vectors, kind)

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
            store(builder, rounded(builder, sums[i], number), out, LANES * ITEMSIZE[number] * i)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, vectors, kind), codegen
