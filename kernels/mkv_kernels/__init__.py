# SPDX-License-Identifier: Apache-2.0
"""Kernels of the projected KV cache. Needs torch (and, on a GPU, triton) alone; `layout` needs neither."""
