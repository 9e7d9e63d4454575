# SPDX-License-Identifier: Apache-2.0
"""Decoding on CPUs: what `attend` computes, in code that numba compiles, reading the pages where they lie."""

from llvmlite.binding import ffi

# llvmlite's handle on its library answers to every name with a function, to `__dict__` too. vLLM 0.32 asks whatever
# any module holds for its `vars()` when an engine starts, and would fail on that answer: no second engine could start
# in a process that has compiled anything.
ffi.lib._fntab.setdefault("__dict__", {})
