# SPDX-License-Identifier: Apache-2.0
"""The vLLM side. The only package here that imports vLLM."""
