# SPDX-License-Identifier: Apache-2.0
"""Decoding on CPUs: what `attend` computes, in code that numba compiles, reading the pages where they lie."""
