# SPDX-License-Identifier: Apache-2.0
"""vllm-mkv serves large language models from vLLM with a projected KV cache."""

__version__ = "0.1.0"
