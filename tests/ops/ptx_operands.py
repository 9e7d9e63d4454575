# SPDX-License-Identifier: Apache-2.0
"""Operands of PTX instructions, as values of a warp's lanes; see `ptx`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ptx import Warp

LANES = 32

Values = np.ndarray
"""A number for each lane."""
Getter = Callable[["Warp"], Values]
Step = Callable[["Warp"], Any]
"""What a line of PTX does."""
Action = Callable[["Warp", "Values | None"], Any]
"""What an instruction does in the lanes of a mask, None for all; returns a label to go to, "barrier", or "end"."""

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
    if name == "nctaid":
        return lambda warp: np.full(LANES, warp.grid[place], np.uint32)
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
