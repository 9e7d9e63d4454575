# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX of compiled kernels on a CPU: what the compiler made of a kernel, where there is no GPU to try it on.

Triton's interpreter runs a kernel's Python. What it cannot show is what becomes of that on the way to a GPU: layouts,
copies that arrive later, loops whose stages overlap. Here a program's warps execute the instructions themselves, 32
lanes at a time in numpy, as far as our kernels use them; one that is not known raises NotImplementedError.

Stricter than a GPU: an address must be aligned and inside one of the launch's tensors, registers and shared memory are
read only after they were written, and copies arrive when they are waited for, not before (or, `eager`, at once: what
a copy must not yet overwrite is then overwritten).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx_instructions import instruction
from ptx_operands import LANES, REGISTERS, Step, Values

LINE = re.compile(r"(?:@(?P<not>!)?(?P<guard>%p\d+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<rest>.*)")


class Memory:
    """What a launch may touch: its tensors, where they lie, and nothing else."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage
        self.starts = sorted(storages)
        self.bytes = [np.asarray(torch.tensor([], dtype=torch.uint8).set_(storages[s])) for s in self.starts]

    def find(self, addresses: Values, size: int) -> tuple[Values, Values]:
        """The tensor's bytes, and places [n, size] in them. Addresses: int64, at least one."""
        region = bisect_right(self.starts, int(addresses[0])) - 1
        if region < 0:
            raise IndexError(f"an access at {addresses[0]:#x}, where there is no tensor")
        places = addresses - self.starts[region]
        if places.min() < 0 or places.max() + size > len(self.bytes[region]):
            raise IndexError(f"an access of {size} bytes at {places} of a tensor of {len(self.bytes[region])} bytes")
        if (addresses % size).any():
            raise IndexError(f"an access of {size} bytes that is not aligned: {addresses}")
        return self.bytes[region], places[:, None] + np.arange(size)


@dataclass
class Shared:
    """A program's shared memory."""

    bytes: Values
    written: Values

    @classmethod
    def of(cls, size: int) -> Shared:
        return cls(np.full(size, 0xA5, np.uint8), np.zeros(size, np.bool_))

    def read(self, addresses: Values, size: int) -> Values:
        places = addresses[:, None] + np.arange(size)
        if not self.written[places].all():
            raise ValueError(f"shared memory is read before it is written: {size} bytes at {addresses}")
        return self.bytes[places]

    def write(self, addresses: Values, data: Values) -> None:
        places = addresses[:, None] + np.arange(data.shape[1])
        self.bytes[places] = data
        self.written[places] = True


@dataclass
class Warp:
    program: tuple[int, int, int]
    grid: tuple[int, int, int]
    number: int
    memory: Memory
    shared: Shared
    parameters: list[int | float]
    eager: bool
    registers: dict[str, Values] = field(default_factory=dict)
    at: int = 0
    copies: list[list[tuple[Values, Values]]] = field(default_factory=list)
    """Groups of copies that were not waited for: where to, and what."""
    open: list[tuple[Values, Values]] = field(default_factory=list)

    def read(self, name: str) -> Values:
        if name not in self.registers:
            raise ValueError(f"{name} is read before it is written")
        return self.registers[name]

    def write(self, name: str, values: Values, mask: Values | None) -> None:
        # What PTX of ours declares in braces has 32 bits, and no % before its name.
        kind = REGISTERS[re.match(r"%([a-z]+)", name)[1]] if name.startswith("%") else np.uint32  # type: ignore[index]
        values = np.ascontiguousarray(values)
        if kind is not np.bool_:
            values = values.view(kind) if values.itemsize == np.dtype(kind).itemsize else values.astype(kind)
        if mask is not None and not mask.all():
            before = self.registers.get(name)
            byte = 0 if kind is np.bool_ else 0xA5
            undefined = np.full(LANES * np.dtype(kind).itemsize, byte, np.uint8).view(kind)
            values = np.where(mask, values, undefined if before is None else before)
        self.registers[name] = values


class Kernel:
    """A kernel's PTX, ready to run."""

    def __init__(self, text: str) -> None:
        self.steps: list[tuple[Step, str]] = []
        self.labels: dict[str, int] = {}
        body = text[text.index(".visible .entry") :]
        body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body[body.index("\n{") + 2 :], flags=re.DOTALL)
        for statement in re.split(
            r"[;\n]", re.sub(r"\{([%\w ,]*)\}", lambda m: "{" + m[1].replace(" ", "") + "}", body)
        ):
            line = statement.strip()
            if label := re.match(r"(\$\w+):$", line):
                self.labels[label[1]] = len(self.steps)
            elif line and not line.startswith((".", "{", "}")):
                if not (found := LINE.match(line)):
                    raise NotImplementedError(line)
                self.steps.append((self._step(found), line))

    def run(
        self, grid: Sequence[int], arguments: Sequence[Any], num_warps: int, shared_bytes: int, *, eager: bool = False
    ) -> None:
        memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        x, y, z = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for program in ((i, j, k) for k in range(z) for j in range(y) for i in range(x)):
                shared = Shared.of(shared_bytes)
                warps = [Warp(program, (x, y, z), n, memory, shared, values, eager) for n in range(num_warps)]
                running = [self._execute(warp) for warp in warps]
                while running:
                    # Each runs up to a barrier, or its end.
                    running = [each for each in running if next(each, None) is not None]

    def _execute(self, warp: Warp) -> Iterator[bool]:
        while warp.at < len(self.steps):
            step, line = self.steps[warp.at]
            warp.at += 1
            try:
                result = step(warp)
            except (ValueError, IndexError) as error:
                raise type(error)(f"{error} (program {warp.program}, `{line}`)") from None
            if result == "barrier":
                yield True
            elif result == "end":
                return
            elif result is not None:
                warp.at = self.labels[result]

    def _step(self, found: re.Match[str]) -> Step:
        opcode, rest = found["opcode"], found["rest"]
        operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
        do = instruction(opcode, operands)
        guard, negated = found["guard"], found["not"] is not None
        if guard is None:
            return lambda warp: do(warp, None)

        def guarded(warp: Warp) -> Any:
            mask = warp.read(guard)
            mask = ~mask if negated else mask
            if opcode.startswith("bra"):
                if mask.any() != mask.all():
                    raise ValueError("lanes part ways")
                return do(warp, None) if mask.all() else None
            # What none of a warp's lanes loads is undefined from then on, but may be moved about.
            return do(warp, mask) if mask.any() or opcode.startswith("ld.") else None

        return guarded
