# SPDX-License-Identifier: Apache-2.0
"""PTX instructions that move what is in memory: loads, stores, copies, matrices, and sums in place; see `ptx`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from ptx_operands import LANES, TYPES, Action, Values, address, getter, lanes, names

if TYPE_CHECKING:
    from ptx import Warp

ALL = np.full(8, -1)
"""Lanes of a matrix's rows: what is in one comes from all lanes, and goes to all."""


def memory_instruction(name: str, modifiers: list[str], operands: list[str]) -> Action:
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
    if name == "atom":
        return sum_in_place(modifiers, operands)
    registers = names(operands[0 if name == "ld" else 1])
    where = address(operands[1 if name == "ld" else 0])
    sources = [getter(register, kind) for register in registers]
    in_shared = any(modifier.startswith("shared") for modifier in modifiers)
    whole = size * len(registers)

    def load(warp: Warp, mask: Values | None) -> None:
        which = lanes(mask)
        addresses = where(warp)[which]
        if not len(which):
            data = np.zeros((0, whole), np.uint8)
        elif in_shared:
            data = warp.shared.read(warp, which, addresses, whole)
        else:
            data = warp.memory.read(warp, addresses, whole)
        for i, register in enumerate(registers):
            values = np.zeros(LANES, kind)
            values[which] = np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(kind)[:, 0]
            warp.write(register, values, mask)

    def store(warp: Warp, mask: Values | None) -> None:
        which = lanes(mask)
        data = np.ascontiguousarray(np.concatenate([source(warp)[which, None] for source in sources], 1)).view(np.uint8)
        if in_shared:
            warp.shared.write(warp, which, where(warp)[which], data)
        else:
            warp.memory.write(warp, where(warp)[which], data)

    return load if name == "ld" else store


def copy_instruction(modifiers: list[str], operands: list[str]) -> Action:
    if "commit_group" in modifiers:

        def commit(warp: Warp, mask: Values | None) -> None:
            warp.copies.append(warp.open)
            warp.open = []

        return commit
    if "wait_group" in modifiers:
        left = int(operands[0], 0)

        def wait(warp: Warp, mask: Values | None) -> None:
            done = max(0, len(warp.copies) - left)
            for copy in (copy for group in warp.copies[:done] for copy in group):
                warp.shared.end_copy(warp, *copy)
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
            data[filled] = warp.memory.read(warp, source(warp)[filled], size)
        addresses = to(warp)[which]
        if (addresses % size).any():
            raise IndexError(f"a copy of {size} bytes to where it is not aligned: {addresses}")
        warp.open.append(warp.shared.begin_copy(warp, which, addresses, data[which]))

    return copy


def matrix_instruction(name: str, modifiers: list[str], operands: list[str]) -> Action:
    """Matrices of 8 x 8 numbers of 16 bits: lane l has numbers 2 (l % 4) and 2 (l % 4) + 1 of row l // 4."""
    transposed = "trans" in modifiers
    is_load = name == "ldmatrix"
    registers, where = names(operands[0 if is_load else 1]), address(operands[1 if is_load else 0])

    def load(warp: Warp, mask: Values | None) -> None:
        rows = where(warp)
        for i, register in enumerate(registers):
            data = warp.shared.read(warp, ALL, rows[8 * i : 8 * i + 8], 16).view(np.uint16)
            data = data.T if transposed else data
            warp.write(register, np.ascontiguousarray(data).reshape(LANES, 2).view(np.uint32)[:, 0], mask)

    def store(warp: Warp, mask: Values | None) -> None:
        rows = where(warp)
        for i, register in enumerate(registers):
            data = warp.read(register).view(np.uint16).reshape(8, 8)
            data = np.ascontiguousarray(data.T if transposed else data)
            warp.shared.write(warp, ALL, rows[8 * i : 8 * i + 8], data.view(np.uint8).reshape(8, 16))

    return load if is_load else store


def sum_in_place(modifiers: list[str], operands: list[str]) -> Action:
    """One lane after the other."""
    if "add" not in modifiers or "global" not in modifiers or modifiers[-1] != "u32":
        raise NotImplementedError(f"atom.{'.'.join(modifiers)}")
    where, value = address(operands[1]), getter(operands[2], np.uint32)

    def add(warp: Warp, mask: Values | None) -> None:
        found = np.zeros(LANES, np.uint32)
        for lane in lanes(mask):
            found[[lane]] = warp.memory.add(where(warp)[[lane]], value(warp)[[lane]])
        warp.order.is_known = True
        warp.write(operands[0], found, mask)

    return add
