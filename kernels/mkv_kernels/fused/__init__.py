# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the projected KV cache: store, decode and prefill. The modules above are their twins in PyTorch."""
