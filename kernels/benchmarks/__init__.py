# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the kernels. The scripts are `bench_*.py`; the other modules are what they share."""
