# SPDX-License-Identifier: Apache-2.0
"""What each instruction of PTX does in the lanes of a warp, as far as our kernels use them; see `ptx`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ptx import Warp

LANES = 32

Values = np.ndarray
"""A number for each lane."""
Getter = Callable[["Warp"], Values]
Step = Callable[["Warp"], Any]

TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
REGISTERS = {"r": np.uint32, "rd": np.uint64, "rs": np.uint16, "f": np.uint32, "p": np.bool_, "b": np.uint8}


def getter(operand: str, kind: Any) -> Getter:
    """Values of an operand as numbers of a type."""
    if operand.startswith("%") or (operand.isidentifier() and operand != "global_smem"):
        if operand.startswith(("%tid", "%ctaid", "%nctaid", "%laneid")):
            return special(operand)
        size = np.dtype(kind).itemsize

        def read(warp: Warp) -> Values:
            values = warp.read(operand)
            if values.dtype == np.bool_:
                return values
            return values.view(kind) if values.itemsize == size else values.astype(f"u{size}").view(kind)

        return read
    if operand == "global_smem":
        constant = np.zeros(LANES, kind)
    elif operand.startswith("0f"):
        constant = np.full(LANES, int(operand[2:], 16), np.uint32).view(kind)
    else:
        number = int(operand.rstrip("U"), 0)
        size = 8 * np.dtype(kind).itemsize
        constant = np.full(LANES, number & ((1 << size) - 1), f"u{size // 8}").view(kind)
    return lambda warp: constant


def special(operand: str) -> Getter:
    name, _, axis = operand[1:].partition(".")
    place = "xyz".index(axis or "x")
    if name == "tid":
        return lambda warp: (np.arange(LANES) + LANES * warp.number if place == 0 else np.zeros(LANES)).astype(
            np.uint32
        )
    if name == "laneid":
        return lambda warp: np.arange(LANES, dtype=np.uint32)
    if name == "ctaid":
        return lambda warp: np.full(LANES, warp.program[place], np.uint32)
    raise NotImplementedError(operand)


def address(operand: str) -> Getter:
    """Of `[%rd1+16]`, int64."""
    inside = operand.strip("[] ").replace(" ", "")
    base, sign, offset = re.match(r"([%\w.]+)(?:([+-]+)(\w+))?$", inside).groups()  # type: ignore[union-attr]
    shift = int(offset or "0", 0) * (-1 if sign and sign.count("-") % 2 else 1)
    of = getter(base, np.uint64 if base.startswith("%rd") else np.uint32)
    return lambda warp: of(warp).astype(np.int64) + shift


def names(operand: str) -> list[str]:
    return operand.strip("{} ").replace(" ", "").split(",")


def lanes(mask: Values | None) -> Values:
    return np.arange(LANES) if mask is None else np.flatnonzero(mask)


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


def instruction(opcode: str, operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    """What an instruction does in the lanes of a mask, None for all; returns a label to go to, "barrier", or "end"."""
    name, *modifiers = opcode.split(".")
    kinds = [TYPES[m] for m in modifiers if m in TYPES]
    if name in ("bra", "ret", "exit", "bar", "barrier"):
        target = {"bra": operands[0] if operands else "", "ret": "end", "exit": "end"}.get(name, "barrier")
        # Lanes of a warp are always together.
        return (lambda warp, mask: None) if "warp" in modifiers else lambda warp, mask: target
    if name == "redux":
        source, reduce = getter(operands[1], kinds[-1]), {"min": np.min, "max": np.max, "add": np.sum}[modifiers[1]]
        return lambda warp, mask: warp.write(operands[0], np.full(LANES, reduce(source(warp)), kinds[-1]), mask)
    if name in ("ld", "st", "ldmatrix", "stmatrix", "cp"):
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


def memory_instruction(name: str, modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    kind = next((TYPES[m] for m in reversed(modifiers) if m in TYPES), np.uint32)
    size = np.dtype(kind).itemsize
    if name == "ld" and "param" in modifiers:
        number = int(operands[1].strip("[] ").rpartition("_")[2])

        def parameter(warp: Warp, mask: Values | None) -> None:
            value = warp.parameters[number]
            as_kind = np.float32 if isinstance(value, float) else np.dtype(f"u{size}")
            warp.write(operands[0], np.full(LANES, value, as_kind), mask)

        return parameter
    if name == "cp":
        return copy_instruction(modifiers, operands)
    if name in ("ldmatrix", "stmatrix"):
        return matrix_instruction(name, modifiers, operands)
    registers = names(operands[0 if name == "ld" else 1])
    where = address(operands[1 if name == "ld" else 0])
    sources = [getter(register, kind) for register in registers]
    in_shared = "shared" in modifiers
    whole = size * len(registers)

    def load(warp: Warp, mask: Values | None) -> None:
        which = lanes(mask)
        addresses = where(warp)[which]
        if not len(which):
            data = np.zeros((0, whole), np.uint8)
        elif in_shared:
            data = warp.shared.read(addresses, whole)
        else:
            array, places = warp.memory.find(addresses, whole)
            data = array[places]
        for i, register in enumerate(registers):
            values = np.zeros(LANES, kind)
            values[which] = np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(kind)[:, 0]
            warp.write(register, values, mask)

    def store(warp: Warp, mask: Values | None) -> None:
        which = lanes(mask)
        data = np.ascontiguousarray(np.concatenate([source(warp)[which, None] for source in sources], 1)).view(np.uint8)
        if in_shared:
            warp.shared.write(where(warp)[which], data)
        else:
            array, places = warp.memory.find(where(warp)[which], whole)
            array[places] = data

    return load if name == "ld" else store


def copy_instruction(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    if "commit_group" in modifiers:

        def commit(warp: Warp, mask: Values | None) -> None:
            warp.copies.append(warp.open)
            warp.open = []

        return commit
    if "wait_group" in modifiers:
        left = int(operands[0], 0)

        def wait(warp: Warp, mask: Values | None) -> None:
            done = max(0, len(warp.copies) - left)
            for where, data in (copy for group in warp.copies[:done] for copy in group):
                warp.shared.write(where, data)
            warp.copies = warp.copies[done:]

        return wait
    to, source, size = address(operands[0]), address(operands[1]), int(operands[2], 0)
    given = getter(operands[3], np.uint32) if len(operands) > 3 else None

    def copy(warp: Warp, mask: Values | None) -> None:
        which = lanes(mask)
        data = np.zeros((LANES, size), np.uint8)
        filled = which if given is None else which[given(warp)[which] == size]
        if given is not None and not np.isin(given(warp)[which], (0, size)).all():
            raise NotImplementedError("a copy that is filled up")
        if len(filled):
            array, places = warp.memory.find(source(warp)[filled], size)
            data[filled] = array[places]
        addresses = to(warp)[which]
        if (addresses % size).any():
            raise IndexError(f"a copy of {size} bytes to where it is not aligned: {addresses}")
        if warp.eager:
            warp.shared.write(addresses, data[which])
        else:
            warp.open.append((addresses, data[which]))

    return copy


def matrix_instruction(name: str, modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    """Matrices of 8 x 8 numbers of 16 bits: lane l has numbers 2 (l % 4) and 2 (l % 4) + 1 of row l // 4."""
    transposed = "trans" in modifiers
    is_load = name == "ldmatrix"
    registers, where = names(operands[0 if is_load else 1]), address(operands[1 if is_load else 0])

    def load(warp: Warp, mask: Values | None) -> None:
        rows = where(warp)
        for i, register in enumerate(registers):
            data = warp.shared.read(rows[8 * i : 8 * i + 8], 16).view(np.uint16)
            data = data.T if transposed else data
            warp.write(register, np.ascontiguousarray(data).reshape(LANES, 2).view(np.uint32)[:, 0], mask)

    def store(warp: Warp, mask: Values | None) -> None:
        rows = where(warp)
        for i, register in enumerate(registers):
            data = warp.read(register).view(np.uint16).reshape(8, 8)
            data = np.ascontiguousarray(data.T if transposed else data)
            warp.shared.write(rows[8 * i : 8 * i + 8], data.view(np.uint8).reshape(8, 16))

    return load if is_load else store


def mma(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    shape = next(m for m in modifiers if re.match(r"m\d+n\d+k\d+", m))
    rows, columns, depth = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", shape).groups())  # type: ignore[union-attr]
    of = [m for m in modifiers if m in (*TYPES, "bf16")][1]
    to, a, b, c = map(names, operands)
    if (rows, columns) != (16, 8) or of not in ("s8", "f16", "bf16"):
        raise NotImplementedError(f"products {shape} of {of}")
    bits = {"s8": 8, "f16": 16, "bf16": 16}[of]
    each = 32 // bits
    group, within = np.arange(LANES) // 4, np.arange(LANES) % 4
    final = np.int32 if of == "s8" else np.float32
    before = [getter(register, final) for register in c]

    def numbers(warp: Warp, register: str) -> Values:
        """[lanes, each]"""
        word = warp.read(register)[:, None]
        if of == "s8":
            return word.view(np.int8).astype(np.int64)
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


def shuffle(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    value, by = getter(operands[1], np.uint32), getter(operands[2], np.uint32)
    if not {"bfly", "idx"} & set(modifiers) or "|" in operands[0]:
        raise NotImplementedError(f"shfl.{'.'.join(modifiers)}")

    def move(warp: Warp, mask: Values | None) -> None:
        lane, count = np.arange(LANES), by(warp).astype(np.int64)
        warp.write(operands[0], value(warp)[(lane ^ count if "bfly" in modifiers else count) % LANES], mask)

    return move


def permute(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
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


def logic(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
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


def field_of_bits(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    kind = TYPES[modifiers[0]]
    value, begin, count = getter(operands[1], kind), getter(operands[2], np.uint32), getter(operands[3], np.uint32)

    def extract(warp: Warp, mask: Values | None) -> None:
        x, first, size = value(warp).astype(np.int64), begin(warp).astype(np.int64), count(warp).astype(np.int64)
        field_ = (x >> first) & ((1 << size) - 1)
        if np.dtype(kind).kind == "i":
            field_ = np.where((field_ >> np.maximum(size - 1, 0)) & 1, field_ - (1 << size), field_)
        warp.write(operands[0], field_.astype(kind), mask)

    return extract


def convert(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
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


def move(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
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


def select(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
    kind = TYPES[modifiers[0]]
    a, b, which = getter(operands[1], kind), getter(operands[2], kind), getter(operands[3], np.bool_)
    return lambda warp, mask: warp.write(operands[0], np.where(which(warp), a(warp), b(warp)), mask)


def compare(modifiers: list[str], operands: list[str]) -> Callable[[Warp, Values | None], Any]:
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


SPECIAL: dict[str, Callable[[list[str], list[str]], Callable[[Warp, Values | None], Any]]] = {
    "mma": mma, "shfl": shuffle, "prmt": permute, "lop3": logic, "bfe": field_of_bits, "cvt": convert, "mov": move,
    "selp": select, "setp": compare,
}  # fmt: skip
