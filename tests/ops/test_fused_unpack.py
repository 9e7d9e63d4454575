# SPDX-License-Identifier: Apache-2.0
"""The PTX that unpacks codes on CUDA, run here by a few lines that know its few instructions."""

from __future__ import annotations

import pytest
import torch

from mkv_kernels.codes import odd_integers, unpack
from mkv_kernels.fused.unpack import excess, ptx

WORD = 0xFFFFFFFF


def fma(dtype: torch.dtype, a: int, b: int, c: int) -> int:
    def lanes(word: int) -> torch.Tensor:
        halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16)
        return halves.view(dtype).double()

    low, high = (lanes(a) * lanes(b) + lanes(c)).to(dtype).view(torch.uint16).tolist()
    return high << 16 | low


def execute(code: str, word: int) -> int:
    registers = {"$1": word}

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
        elif name == "lop3.b32":
            assert x[3] == 0xEA  # a & b | c
            result = x[0] & x[1] | x[2]
        elif name.startswith("fma.rn."):
            assert not any(source[0].isdigit() for source in sources), "it takes registers alone"
            result = fma({"f16x2": torch.float16, "bf16x2": torch.bfloat16}[name.removeprefix("fma.rn.")], *x)
        else:
            raise AssertionError(f"unknown instruction {line}")
        registers[to] = result & WORD
    return registers["$0"]


def plain(function):
    """A function of kernels' compile time, as Python's own."""
    return getattr(function, "fn", function)


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 4, 2])
def test_every_word_becomes_its_odd_integers(width, dtype, raised):
    half = dtype == torch.float16
    for part in range(16 // width):
        code = plain(ptx)(width, part, half, raised)
        more = plain(excess)(width, part, half) if raised else 0
        # Every code in either half, beside others.
        for word in range(0, 1 << 16, 37):
            words = torch.tensor([word, word ^ 0xFFFF], dtype=torch.int32).to(torch.int16)
            pair = execute(code, word | (word ^ 0xFFFF) << 16)
            halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32)
            expected = odd_integers(unpack(words, width).view(16 // width, 2)[part], width)
            assert torch.equal(halves.to(torch.uint16).view(dtype).to(torch.int16), expected + more)


@pytest.mark.parametrize("width", [8, 4, 2])
def test_what_keys_have_too_much_is_exact(width):
    for half, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        for part in range(16 // width):
            more = plain(excess)(width, part, half)
            assert float(torch.tensor(more).to(dtype)) == more
