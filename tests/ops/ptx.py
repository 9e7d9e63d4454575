# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX of compiled kernels on a CPU: what the compiler made of a kernel, where there is no GPU to try it on.

Triton's interpreter runs a kernel's Python. What it cannot show is what becomes of that on the way to a GPU: layouts,
copies that arrive later, loops whose stages overlap. Here a program's warps execute the instructions themselves, 32
lanes at a time in numpy, as far as our kernels use them; one that is not known raises NotImplementedError.

Stricter than a GPU: an address must be aligned and inside one of the launch's tensors, registers and shared memory are
read only after they were written, copies arrive when they are waited for, not before, and no order of warps, programs
and copies may change what comes of it (see `ptx_races`).
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
from ptx_races import Accesses, Race

MOST_WARPS = 64
"""Of a program, on any GPU."""
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
        self.by_program, self.by_warp = (
            [Accesses(len(array), agents) for array in self.bytes] for agents in ("program", "warp")
        )

    def read(self, warp: Warp, addresses: Values, size: int) -> Values:
        """[n, size] bytes. Addresses: int64, at least one."""
        region, places = self._find(addresses, size)
        self.by_warp[region].read(warp.number, places, warp.turn)
        if not warp.order.is_known:
            self.by_program[region].read(warp.order.number, places, 0)
        return self.bytes[region][places]

    def write(self, warp: Warp, addresses: Values, data: Values) -> None:
        region, places = self._find(addresses, data.shape[1])
        changed = self.bytes[region][places] != data
        self.by_warp[region].write(warp.number, places, warp.turn, changed)
        if not warp.order.is_known:
            self.by_program[region].write(warp.order.number, places, 0, changed)
        put(self.bytes[region], places, data)

    def add(self, address: Values, number: Values) -> Values:
        """In place, atomically; what was there. Shapes: [1] of int64, [1] of uint32."""
        region, places = self._find(address, 4)
        found = self.bytes[region][places].view(np.uint32)[0]
        self.bytes[region][places] = (found + number).view(np.uint8)[None]
        return found

    def _find(self, addresses: Values, size: int) -> tuple[int, Values]:
        region = bisect_right(self.starts, int(addresses[0])) - 1
        if region < 0:
            raise IndexError(f"an access at {addresses[0]:#x}, where there is no tensor")
        places = addresses - self.starts[region]
        if places.min() < 0 or places.max() + size > len(self.bytes[region]):
            raise IndexError(f"an access of {size} bytes at {places} of a tensor of {len(self.bytes[region])} bytes")
        if (addresses % size).any():
            raise IndexError(f"an access of {size} bytes that is not aligned: {addresses}")
        return region, places[:, None] + np.arange(size)


class Shared:
    """A program's shared memory."""

    def __init__(self, size: int) -> None:
        self.bytes, self.written = np.full(size, 0xA5, np.uint8), np.zeros(size, np.bool_)
        self.by_warp, self.by_lane = Accesses(size, "warp"), Accesses(size, "lane")

    def read(self, warp: Warp, lanes: Values, addresses: Values, size: int) -> Values:
        """[n, size] bytes. Lanes: that read them, [n], -1 for all."""
        places = addresses[:, None] + np.arange(size)
        if not self.written[places].all():
            raise ValueError(f"shared memory is read before it is written: {size} bytes at {addresses}")
        self.by_warp.read(warp.number, places, warp.turn)
        self.by_lane.read(lanes[:, None], places, warp.lanes_turn)
        return self.bytes[places]

    def write(self, warp: Warp, lanes: Values, addresses: Values, data: Values) -> None:
        places = addresses[:, None] + np.arange(data.shape[1])
        changed = (self.bytes[places] != data) | ~self.written[places]
        self.by_warp.write(warp.number, places, warp.turn, changed)
        self.by_lane.write(lanes[:, None], places, warp.lanes_turn, changed)
        self._put(places, data)

    def begin_copy(self, warp: Warp, lanes: Values, addresses: Values, data: Values) -> tuple[Values, Values, Values]:
        """What `end_copy` takes."""
        places = addresses[:, None] + np.arange(data.shape[1])
        self.by_warp.begin_copy(warp.number, places, warp.turn)
        self.by_lane.begin_copy(lanes[:, None], places, warp.lanes_turn)
        return lanes, places, data

    def end_copy(self, warp: Warp, lanes: Values, places: Values, data: Values) -> None:
        self.by_warp.end_copy(warp.number, places, warp.turn)
        self.by_lane.end_copy(lanes[:, None], places, warp.lanes_turn)
        self._put(places, data)

    def _put(self, places: Values, data: Values) -> None:
        put(self.bytes, places, data)
        self.written[places] = True


def put(array: Values, places: Values, data: Values) -> None:
    """Of lanes that write to one place, any may be last."""
    array[places] = data
    if (array[places] != data).any():
        raise Race("a race: lanes write different bytes to one place")


@dataclass
class Order:
    """A program's number, and whether an atomic counter told it what programs before it did."""

    number: int
    is_known: bool = False


@dataclass
class Warp:
    program: tuple[int, int, int]
    grid: tuple[int, int, int]
    number: int
    memory: Memory
    shared: Shared
    parameters: list[int | float]
    order: Order
    registers: dict[str, Values] = field(default_factory=dict)
    at: int = 0
    turn: int = 0
    """Between which barriers of the launch it is."""
    own_barriers: int = 0
    copies: list[list[tuple[Values, Values, Values]]] = field(default_factory=list)
    """Groups of copies that were not waited for, of `Shared.begin_copy`."""
    open: list[tuple[Values, Values, Values]] = field(default_factory=list)

    @property
    def lanes_turn(self) -> int:
        """Between which barriers its lanes are, its own included: a number that no other warp has."""
        return self.own_barriers * MOST_WARPS + self.number

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

    def run(self, grid: Sequence[int], arguments: Sequence[Any], num_warps: int, shared_bytes: int) -> None:
        memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        x, y, z = (*grid, 1, 1)[:3]
        turn = 0
        with np.errstate(all="ignore"):
            for number, program in enumerate((i, j, k) for k in range(z) for j in range(y) for i in range(x)):
                shared, order = Shared(shared_bytes), Order(number)
                warps = [Warp(program, (x, y, z), n, memory, shared, values, order) for n in range(num_warps)]
                running = [self._execute(warp) for warp in warps]
                while running:
                    turn += 1
                    for warp in warps:
                        warp.turn = turn
                        warp.own_barriers += 1
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
