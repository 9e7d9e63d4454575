# SPDX-License-Identifier: Apache-2.0
"""What each instruction of PTX does in the lanes of a warp, as far as our kernels use them; see `ptx`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ptx_memory import memory_instruction
from ptx_operands import LANES, TYPES, Action, Values, getter, names

if TYPE_CHECKING:
    from ptx import Warp

ARITHMETIC: dict[str, Callable[..., Values]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "ex2": np.exp2,
    "sqrt": np.sqrt,
    "rcp": lambda a: (1 / a).astype(a.dtype),
}
COMPARISONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def extreme(larger: bool, kind: Any) -> Callable[[Values, Values], Values]:
    if np.issubdtype(kind, np.floating):
        return np.fmax if larger else np.fmin
    return np.maximum if larger else np.minimum


def divided(a: Values, b: Values) -> Values:
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def bfloat16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Values) -> Values:
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def instruction(opcode: str, operands: list[str]) -> Action:
    name, *modifiers = opcode.split(".")
    kinds = [TYPES[m] for m in modifiers if m in TYPES]
    if name in ("bra", "ret", "exit", "bar", "barrier"):
        target = {"bra": operands[0] if operands else "", "ret": "end", "exit": "end"}.get(name, "barrier")
        return wait_for_lanes if "warp" in modifiers else lambda warp, mask: target
    if name == "redux":
        source, reduce = getter(operands[1], kinds[-1]), {"min": np.min, "max": np.max, "add": np.sum}[modifiers[1]]
        return lambda warp, mask: warp.write(operands[0], np.full(LANES, reduce(source(warp)), kinds[-1]), mask)
    if name in ("ld", "st", "ldmatrix", "stmatrix", "cp", "atom"):
        return memory_instruction(name, modifiers, operands)
    if name in ("mma", "shfl", "prmt", "lop3", "bfe", "cvt", "mov", "selp", "setp"):
        return SPECIAL[name](modifiers, operands)
    if "pred" in modifiers:
        sources = [getter(o, np.bool_) for o in operands[1:]]
        return lambda warp, mask: warp.write(operands[0], ARITHMETIC[name](*(s(warp) for s in sources)), mask)
    if modifiers[-1:] in (["s16x2"], ["u16x2"]) and name in ("add", "sub"):
        pairs = [getter(o, np.uint32) for o in operands[1:]]

        def by_halves(warp: Warp, mask: Values | None) -> None:
            halves = (np.ascontiguousarray(pair(warp)).view(np.uint16) for pair in pairs)
            warp.write(operands[0], ARITHMETIC[name](*halves).view(np.uint32), mask)

        return by_halves
    if modifiers[-1:] in (["f16x2"], ["bf16x2"]) and name in ("fma", "add", "mul"):
        pairs, as_half = [getter(o, np.uint32) for o in operands[1:]], modifiers[-1] == "f16x2"

        def by_pairs(warp: Warp, mask: Values | None) -> None:
            halves = (np.ascontiguousarray(pair(warp)).view(np.uint16) for pair in pairs)
            found = ARITHMETIC[name](
                *((h.view(np.float16) if as_half else bfloat16(h)).astype(np.float64) for h in halves)
            )
            rounded = found.astype(np.float16).view(np.uint16) if as_half else to_bfloat16(found.astype(np.float32))
            warp.write(operands[0], np.ascontiguousarray(rounded).view(np.uint32), mask)

        return by_pairs
    if not kinds:
        raise NotImplementedError(opcode)
    kind = kinds[-1]
    to = operands[0]
    if name in ("mul", "mad") and "wide" in modifiers:
        double = np.dtype(f"{np.dtype(kind).kind}{2 * np.dtype(kind).itemsize}")
        a, b = getter(operands[1], kind), getter(operands[2], kind)
        c = getter(operands[3], double) if name == "mad" else None

        def wide(warp: Warp, mask: Values | None) -> None:
            product = a(warp).astype(double) * b(warp).astype(double)
            warp.write(to, product if c is None else product + c(warp), mask)

        return wide
    if name == "mul" and "hi" in modifiers:
        a, b, bits = getter(operands[1], kind), getter(operands[2], kind), 8 * np.dtype(kind).itemsize
        # Python's integers have room for any product.
        return lambda warp, mask: warp.write(
            to, (a(warp).astype(object) * b(warp).astype(object) >> bits).astype(kind), mask
        )
    if name in ("shl", "shr"):
        value, by = getter(operands[1], kind), getter(operands[2], np.uint32)
        size = 8 * np.dtype(kind).itemsize

        def shift(warp: Warp, mask: Values | None) -> None:
            x, count = value(warp), by(warp).astype(np.int64)
            inside = np.minimum(count, size - 1).astype(x.dtype)
            moved = x << inside if name == "shl" else x >> inside
            if name == "shl" or np.dtype(kind).kind == "u":
                moved = np.where(count >= size, np.zeros_like(x), moved)
            warp.write(to, moved, mask)

        return shift
    sources = [getter(o, kind) for o in operands[1:]]
    operate: Callable[..., Values]
    if name in ("max", "min"):
        operate = extreme(name == "max", kind)
    elif name in ("div", "rem"):
        operate = divided if name == "div" else lambda a, b: a - divided(a, b) * b
    elif name in ARITHMETIC and (name != "mul" or np.dtype(kind).kind == "f" or "lo" in modifiers):
        operate = ARITHMETIC[name]
    else:
        raise NotImplementedError(opcode)
    return lambda warp, mask: warp.write(to, operate(*(source(warp) for source in sources)), mask)


def wait_for_lanes(warp: Warp, mask: Values | None) -> None:
    warp.own_barriers += 1


def mma(modifiers: list[str], operands: list[str]) -> Action:
    shape = next(m for m in modifiers if re.match(r"m\d+n\d+k\d+", m))
    rows, columns, depth = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", shape).groups())  # type: ignore[union-attr]
    of = [m for m in modifiers if m in (*TYPES, "bf16", "tf32")][1]
    to, a, b, c = map(names, operands)
    if (rows, columns) != (16, 8) or of not in ("s8", "f16", "bf16", "tf32"):
        raise NotImplementedError(f"products {shape} of {of}")
    bits = {"s8": 8, "f16": 16, "bf16": 16, "tf32": 32}[of]
    each = 32 // bits
    group, within = np.arange(LANES) // 4, np.arange(LANES) % 4
    final = np.int32 if of == "s8" else np.float32
    before = [getter(register, final) for register in c]

    def numbers(warp: Warp, register: str) -> Values:
        """[lanes, each]"""
        word = warp.read(register)[:, None]
        if of == "s8":
            return word.view(np.int8).astype(np.int64)
        if of == "tf32":
            # 10 bits of mantissa are what is multiplied.
            return (word & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        halves = word.view(np.uint16)
        return (halves.view(np.float16) if of == "f16" else bfloat16(halves)).astype(np.float64)

    def multiply(warp: Warp, mask: Values | None) -> None:
        kind = np.int64 if of == "s8" else np.float64
        left, right = np.zeros((16, depth), kind), np.zeros((depth, 8), kind)
        for i, register in enumerate(a):
            row, first = group + 8 * (i % 2), each * within + 4 * each * (i // 2)
            left[row[:, None], first[:, None] + np.arange(each)] = numbers(warp, register)
        for i, register in enumerate(b):
            first = each * within + 4 * each * i
            right[first[:, None] + np.arange(each), group[:, None]] = numbers(warp, register)
        product = left @ right
        for i, register in enumerate(to):
            found = product[group + 8 * (i // 2), 2 * within + i % 2] + before[i](warp)
            if of == "s8" and np.abs(found).max() >= 1 << 31:
                raise ValueError("a sum beyond 32 bits")
            warp.write(register, found.astype(final), mask)

    return multiply


def shuffle(modifiers: list[str], operands: list[str]) -> Action:
    value, by = getter(operands[1], np.uint32), getter(operands[2], np.uint32)
    if not {"bfly", "idx"} & set(modifiers) or "|" in operands[0]:
        raise NotImplementedError(f"shfl.{'.'.join(modifiers)}")

    def move(warp: Warp, mask: Values | None) -> None:
        lane, count = np.arange(LANES), by(warp).astype(np.int64)
        warp.write(operands[0], value(warp)[(lane ^ count if "bfly" in modifiers else count) % LANES], mask)

    return move


def permute(modifiers: list[str], operands: list[str]) -> Action:
    a, b, selector = (getter(o, np.uint32) for o in operands[1:])

    def pick(warp: Warp, mask: Values | None) -> None:
        pool = np.stack([a(warp), b(warp)], 1).view(np.uint8)
        which = selector(warp)
        out = np.zeros((LANES, 4), np.uint8)
        for i in range(4):
            nibble = (which >> (4 * i)) & 0xF
            byte = pool[np.arange(LANES), nibble & 7]
            out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        warp.write(operands[0], out.view(np.uint32)[:, 0], mask)

    return pick


def logic(modifiers: list[str], operands: list[str]) -> Action:
    a, b, c = (getter(o, np.uint32) for o in operands[1:4])
    table = int(operands[4].rstrip("U"), 0)

    def operate(warp: Warp, mask: Values | None) -> None:
        x, y, z = a(warp), b(warp), c(warp)
        out = np.zeros(LANES, np.uint32)
        for row in range(8):
            if table >> row & 1:
                out |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        warp.write(operands[0], out, mask)

    return operate


def field_of_bits(modifiers: list[str], operands: list[str]) -> Action:
    kind = TYPES[modifiers[0]]
    value, begin, count = getter(operands[1], kind), getter(operands[2], np.uint32), getter(operands[3], np.uint32)

    def extract(warp: Warp, mask: Values | None) -> None:
        x, first, size = value(warp).astype(np.int64), begin(warp).astype(np.int64), count(warp).astype(np.int64)
        field_ = (x >> first) & ((1 << size) - 1)
        if np.dtype(kind).kind == "i":
            field_ = np.where((field_ >> np.maximum(size - 1, 0)) & 1, field_ - (1 << size), field_)
        warp.write(operands[0], field_.astype(kind), mask)

    return extract


def convert(modifiers: list[str], operands: list[str]) -> Action:
    to, source = [m for m in modifiers if m in (*TYPES, "bf16", "f16x2", "bf16x2")][-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (getter(o, np.float32) for o in operands[1:3])

        def pack(warp: Warp, mask: Values | None) -> None:
            pair = np.stack([low(warp), high(warp)], 1)
            halves = to_bfloat16(pair) if to == "bf16x2" else pair.astype(np.float16).view(np.uint16)
            warp.write(operands[0], np.ascontiguousarray(halves).view(np.uint32)[:, 0], mask)

        return pack
    value = getter(operands[1], np.uint16 if source == "bf16" else TYPES[source])

    def change(warp: Warp, mask: Values | None) -> None:
        x = value(warp)
        x = bfloat16(x) if source == "bf16" else x
        if to == "bf16":
            x = to_bfloat16(x.astype(np.float32))
        elif np.issubdtype(TYPES[to], np.integer) and np.issubdtype(x.dtype, np.floating):
            x = (np.rint(x) if "rni" in modifiers else np.trunc(x)).astype(TYPES[to])
        else:
            x = x.astype(TYPES[to])
        warp.write(operands[0], x, mask)

    return change


def move(modifiers: list[str], operands: list[str]) -> Action:
    if modifiers == ["pred"]:
        value = getter(operands[1], np.bool_)
        return lambda warp, mask: warp.write(operands[0], value(warp), mask)
    kind = TYPES[modifiers[0]]
    if operands[0].startswith("{"):
        parts, source = names(operands[0]), getter(operands[1], kind)
        small = np.dtype(f"u{np.dtype(kind).itemsize // len(parts)}")

        def split(warp: Warp, mask: Values | None) -> None:
            pieces = source(warp)[:, None].view(small)
            for i, part in enumerate(parts):
                if part != "_":
                    warp.write(part, pieces[:, i], mask)

        return split
    if operands[1].startswith("{"):
        parts = names(operands[1])
        small = np.dtype(f"u{np.dtype(kind).itemsize // len(parts)}")
        sources = [getter(part, small) for part in parts]

        def join(warp: Warp, mask: Values | None) -> None:
            pieces = np.stack([source(warp) for source in sources], 1)
            warp.write(operands[0], np.ascontiguousarray(pieces).view(kind)[:, 0], mask)

        return join
    value = getter(operands[1], kind)
    return lambda warp, mask: warp.write(operands[0], value(warp), mask)


def select(modifiers: list[str], operands: list[str]) -> Action:
    kind = TYPES[modifiers[0]]
    a, b, which = getter(operands[1], kind), getter(operands[2], kind), getter(operands[3], np.bool_)
    return lambda warp, mask: warp.write(operands[0], np.where(which(warp), a(warp), b(warp)), mask)


def compare(modifiers: list[str], operands: list[str]) -> Action:
    if len(modifiers) != 2:
        raise NotImplementedError(f"setp.{'.'.join(modifiers)}")
    how, kind = modifiers[0], TYPES[modifiers[1]]
    a, b = getter(operands[1], kind), getter(operands[2], kind)

    def test(warp: Warp, mask: Values | None) -> None:
        x, y = a(warp), b(warp)
        if how in ("nan", "num"):
            found = (np.isnan(x) | np.isnan(y)) == (how == "nan")
        elif how in ("ltu", "leu", "gtu", "geu", "equ"):
            found = COMPARISONS[how[:2]](x, y) | np.isnan(x) | np.isnan(y)
        elif how == "ne" and np.issubdtype(kind, np.floating):
            found = (x != y) & ~(np.isnan(x) | np.isnan(y))
        else:
            found = COMPARISONS[how](x, y)
        warp.write(operands[0], found, mask)

    return test


SPECIAL: dict[str, Callable[[list[str], list[str]], Action]] = {
    "mma": mma, "shfl": shuffle, "prmt": permute, "lop3": logic, "bfe": field_of_bits, "cvt": convert, "mov": move,
    "selp": select, "setp": compare,
}  # fmt: skip
