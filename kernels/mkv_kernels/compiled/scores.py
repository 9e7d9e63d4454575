# SPDX-License-Identifier: Apache-2.0
"""What the decode kernel does with keys, as functions that numba code calls with addresses.

scales        of 16 tokens, as floats; of keys or values
code_scores   s[row, token] = sum_r q[row, r] k[token, r] scale     rows of a tile, `STRIPS`, coordinates with codes
scores        s[row, token] += sum_r q[row, r] k[token, r]          rows of a tile, `TOKENS`, the 16-bit tier
cap           s[token] = c tanh(s[token] a)                         of one row
largest       of one row
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from mkv_kernels.codes import SCALE_SHIFT
from mkv_kernels.compiled.tile import STRIPS, TOKENS, numbers_of, operand_bytes
from mkv_kernels.compiled.vector import (
    BFLOATS,
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    ITEMSIZE,
    LANES,
    PAIRS,
    STRIP,
    UNIT,
    Sums,
    call,
    constant,
    exp2,
    lane_sums,
    load,
    load_numbers,
    load_operands,
    load_strip,
    multiply_add,
    odd_floats,
    part_pairs,
    shuffle,
    splat,
    steps,
    store,
    twice,
)


@intrinsic
def scales(typingctx: Any, codes: Any, out: Any) -> Any:
    """Scales of 16 tokens, from bytes to floats, as `codes.scale_values`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.zext(load(builder, ir.VectorType(I8, LANES), arguments[0]), STRIP)
        halves = builder.bitcast(builder.shl(bits, constant(STRIP, SCALE_SHIFT)), ir.VectorType(ir.HalfType(), LANES))
        store(builder, builder.fpext(halves, FLOATS), arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def code_scores(
    typingctx: Any, q: Any, strips: Any, side: Any, scales: Any, out: Any, stride: Any, step: Any, rows: Any, kind: Any
) -> Any:
    """Scores of `rows` query heads against `STRIPS` of 16 tokens, of the coordinates that have codes.

    Addresses: q, entries of 4 bytes [words, parts, rows], for PAIRS of two parts each; strips, int64, where the first
    word of 16 tokens would lie in their page; side, its fields; scales, floats of the tokens; out, floats, rows
    `stride` bytes apart. Words lie `step` bytes apart.
    """
    num_rows, number = numbers_of(rows, kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, strips, side, scales, out, stride, step = arguments[:7]
        first = [load(builder, I64, strips, 8 * strip) for strip in range(STRIPS)]
        sums = Sums(builder, num_rows * STRIPS)
        q_here = cgutils.alloca_once_value(builder, q)

        def add(fields: Any, width: int, parts: int) -> None:
            offset = load(builder, I64, fields)
            with steps(builder, load(builder, I64, fields, 8)) as word:
                ahead = builder.add(offset, builder.mul(word, step))
                words = [load_strip(builder, builder.add(address, ahead)) for address in first]
                if number == PAIRS:
                    words = [twice(builder, strip) for strip in words]
                here = builder.load(q_here)
                entries = range(parts // 2) if number == PAIRS else range(parts)
                # Of floats, a word's parts are summed before they are added: long sums of small terms lose bits.
                total = sums if number == PAIRS else Sums(builder, num_rows * STRIPS)
                for entry in entries:
                    if number == PAIRS:
                        k = [part_pairs(builder, strip, width, 2 * entry) for strip in words]
                    else:
                        k = [odd_floats(builder, strip, width, entry) for strip in words]
                    for row in range(num_rows):
                        at = 4 * (entry * num_rows + row)
                        if number == PAIRS:
                            q_i = builder.bitcast(splat(builder, load(builder, I32, here, at)), BFLOATS)
                        else:
                            q_i = splat(builder, load(builder, F32, here, at))
                        for strip in range(STRIPS):
                            i = row * STRIPS + strip
                            total[i] = multiply_add(builder, number, total[i], q_i, k[strip])
                if number != PAIRS:
                    for i in range(num_rows * STRIPS):
                        sums[i] = builder.fadd(sums[i], total[i])
                builder.store(builder.add(here, I64(4 * len(entries) * num_rows)), q_here)

        with steps(builder, I64(2)) as tier:
            add(builder.add(side, builder.add(I64(16), builder.shl(tier, I64(4)))), 4, 4)
        add(builder.add(side, I64(48)), 2, 8)
        for strip in range(STRIPS):
            scale = load(builder, FLOATS, scales, 4 * LANES * strip)
            for row in range(num_rows):
                to = builder.add(out, builder.mul(stride, I64(row)))
                store(builder, builder.fmul(sums[row * STRIPS + strip], scale), to, 4 * LANES * strip)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, rows, kind), codegen


@intrinsic
def scores(
    typingctx: Any, q: Any, pages: Any, slots: Any, side: Any, more: Any, out: Any, stride: Any, rows: Any, kind: Any
) -> Any:
    """Scores of `rows` query heads against `TOKENS`, of the 16-bit tier; added to what is there where `more` is not 0.

    Addresses: q, operands [units, rows]; pages and slots, int64 of the tokens; side, its fields; out, floats, rows
    `stride` bytes apart.
    """
    num_rows, number = numbers_of(rows, kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, pages, slots, side, more, out, stride = arguments[:7]
        size, start = load(builder, I64, side, 8), load(builder, I64, side)
        bytes_per_token = builder.mul(size, I64(ITEMSIZE[number]))
        tokens = []
        for token in range(TOKENS):
            page, slot = (load(builder, I64, x, 8 * token) for x in (pages, slots))
            tokens.append(builder.add(builder.add(page, start), builder.mul(slot, bytes_per_token)))
        sums = Sums(builder, num_rows * TOKENS)
        q_here = cgutils.alloca_once_value(builder, q)

        def add(k: list[list[Any]], count: int = UNIT) -> None:
            here = builder.load(q_here)
            for row in range(num_rows):
                offset = I64(row * operand_bytes(number))
                for i, q_i in enumerate(load_operands(builder, number, builder.add(here, offset), count)):
                    for token in range(TOKENS):
                        total = row * TOKENS + token
                        sums[total] = multiply_add(builder, number, sums[total], q_i, k[token][i])
            builder.store(builder.add(here, I64(num_rows * operand_bytes(number))), q_here)

        with steps(builder, builder.lshr(size, I64(5))) as unit:
            offset = builder.mul(unit, I64(UNIT * ITEMSIZE[number]))
            add([load_numbers(builder, number, builder.add(token, offset)) for token in tokens])
        with builder.if_then(builder.icmp_signed("!=", builder.and_(size, I64(LANES)), I64(0))):
            offset = builder.mul(builder.sub(size, I64(LANES)), I64(ITEMSIZE[number]))
            add([load_numbers(builder, number, builder.add(token, offset), LANES) for token in tokens], LANES)
        found = lane_sums(builder, [sums[i] for i in range(num_rows * TOKENS)])
        four, none = ir.VectorType(F32, TOKENS), constant(ir.VectorType(F32, TOKENS), 0.0)
        added = builder.icmp_signed("!=", more, I64(0))
        for row in range(num_rows):
            part = shuffle(builder, found, found, range(row * TOKENS, (row + 1) * TOKENS))
            to = builder.add(out, builder.mul(stride, I64(row)))
            store(builder, builder.fadd(part, builder.select(added, load(builder, four, to), none)), to)
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
