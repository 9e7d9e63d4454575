# SPDX-License-Identifier: Apache-2.0
"""The PTX that unpacks codes on CUDA, run here by a few lines that know its few instructions."""

from __future__ import annotations

import pytest
import torch

from mkv_kernels.codes import odd_integers, unpack
from mkv_kernels.fused.unpack import ptx

WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = source[nibble & 7]
        if nibble & 8:  # replicates the sign
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


def fma(dtype: torch.dtype, a: int, b: int, c: int) -> int:
    def lanes(word: int) -> torch.Tensor:
        halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16)
        return halves.view(dtype).double()

    low, high = (lanes(a) * lanes(b) + lanes(c)).to(dtype).view(torch.uint16).tolist()
    return high << 16 | low


def execute(code: str, word: int) -> list[int]:
    registers = {"$2": word}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in code.strip("{} ").rstrip(";").split("; "):
        name, _, rest = line.strip().partition(" ")
        if name == ".reg":
            continue
        to, *sources = (part.strip() for part in rest.split(","))
        x = [value(source) for source in sources]
        if name == "mov.b32":
            result = x[0]
        elif name == "shl.b32":
            result = x[0] << x[1]
        elif name == "shr.b32":
            result = x[0] >> x[1]
        elif name == "and.b32":
            result = x[0] & x[1]
        elif name == "prmt.b32":
            result = prmt(*x)
        elif name == "lop3.b32":
            assert x[3] == 0xCA  # a ? b : c
            result = (x[0] & x[1]) | (~x[0] & x[2])
        elif name.startswith("fma.rn."):
            result = fma({"f16x2": torch.float16, "bf16x2": torch.bfloat16}[name.removeprefix("fma.rn.")], *x)
        else:
            raise AssertionError(f"unknown instruction {line}")
        registers[to] = result & WORD
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 4, 2])
def test_every_byte_becomes_its_odd_integers(width, dtype):
    for part in range(8 // width):
        code = getattr(ptx, "fn", ptx)(width, part, dtype == torch.float16)
        for first in range(0, 256, 4):
            packed = torch.arange(first, first + 4, dtype=torch.uint8).flip(0)
            words = execute(code, int.from_bytes(bytes(packed.tolist()), "little"))
            halves = torch.tensor([h for word in words for h in (word & 0xFFFF, word >> 16)], dtype=torch.int32)
            expected = odd_integers(unpack(packed, width).view(8 // width, 4)[part], width)
            assert torch.equal(halves.to(torch.uint16).view(dtype).to(torch.int16), expected)
