# SPDX-License-Identifier: Apache-2.0
"""Preparing a model: statistics, bases, and the reference attention. Needs torch and transformers, never vLLM."""
