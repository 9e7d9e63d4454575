# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernels (0.32) as its backends call them, without an engine: attention, and the writing of caches.

Caches have the shapes and strides that its backends give them: [blocks, block_size, KV heads, ..] with a head's key,
its scale where it has one, value and scale side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.layer import Setting
    from benchmarks.peers import Problem, Write

Made = tuple[Callable[[], torch.Tensor], int]
"""The call, and bytes of a cached token."""

# Constants of vllm/v1/attention/backends/triton_attn.py: from how many requests on a launch has programs enough without
# splits of the context, and the number of splits.
MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS = 128, 16
TURBOQUANT_SPLITS = 32
"""AttentionConfig.tq_max_kv_splits_for_cuda_graph."""
SCALE_BYTES = 4


def exact_writer(setting: Setting, num_blocks: int) -> tuple[tuple[torch.Tensor, torch.Tensor], Write]:
    """A cache of the model's dtype."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    d = setting.geometry.head_size
    size = (num_blocks, setting.block_size, setting.geometry.kv_heads, 2 * d)
    keys, values = torch.empty(size, dtype=setting.dtype, device=setting.device).split(d, dim=-1)
    one = torch.ones((), device=setting.device)

    def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        triton_reshape_and_cache_flash(k, v, keys, values, slots, "auto", one, one)

    return (keys, values), write


def coded_writer(setting: Setting, num_blocks: int, cache_dtype: str) -> tuple[dict[str, Any], Write, int]:
    """A cache of codes with a scale per token and head: keyword arguments of attention, writer, bytes per token."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash_per_token_head_quant,
    )
    from vllm.v1.kv_cache_interface import KVQuantMode

    mode = KVQuantMode[cache_dtype.upper()]
    d, packed = setting.geometry.head_size, mode == KVQuantMode.INT4_PER_TOKEN_HEAD
    side = (d // 2 if packed else d) + SCALE_BYTES
    size = (num_blocks, setting.block_size, setting.geometry.kv_heads, 2 * side)
    cache = torch.zeros(size, dtype=torch.uint8 if packed else torch.int8, device=setting.device)
    keys, values = cache.split(side, dim=-1)
    scales = cache.view(torch.float32)
    key_scales, value_scales = (scales[..., part // SCALE_BYTES - 1] for part in (side, 2 * side))

    def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        triton_reshape_and_cache_flash_per_token_head_quant(
            k, v, keys, values, key_scales, value_scales, slots, kv_quant_mode=mode
        )

    attention = {
        "k": keys,
        "v": values,
        "kv_quant_mode": mode,
        "k_scale_cache": key_scales,
        "v_scale_cache": value_scales,
        "k_descale": None,
        "v_descale": None,
    }
    return attention, write, setting.geometry.kv_heads * 2 * side


def turboquant_writer(setting: Setting, num_blocks: int, cache_dtype: str) -> tuple[dict[str, Any], Write, int]:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    d, device = setting.geometry.head_size, setting.device
    config = TurboQuantConfig.from_cache_dtype(cache_dtype, d)
    size = (num_blocks, setting.block_size, setting.geometry.kv_heads, config.slot_size_aligned)
    cache = torch.zeros(size, dtype=torch.uint8, device=device)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < d:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rotation = (hadamard / d**0.5).to(device)
    centroids = get_centroids(d, config.centroid_bits).to(device, torch.float32)
    sorted_ = centroids.sort().values
    midpoints = (sorted_[:-1] + sorted_[1:]) / 2
    common = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }

    def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        triton_turboquant_store(k, v, cache, slots.to(torch.int32), rotation, midpoints, **common)

    attention = {
        "kv_cache": cache,
        "Pi": rotation,
        "PiT": rotation,
        "centroids": centroids,
        "norm_correction": config.norm_correction,
        **common,
    }
    return attention, write, setting.geometry.kv_heads * config.slot_size_aligned


def unified(problem: Problem) -> Made:
    (keys, values), write = exact_writer(problem.setting, problem.num_blocks)
    problem.fill(write)
    one = torch.ones((), device=problem.setting.device)
    descale = one.expand(problem.shape.batch, problem.setting.geometry.kv_heads)
    cache = {"k": keys, "v": values, "k_descale": descale, "v_descale": descale}
    return _unified(problem, cache), problem.setting.geometry.full_bytes(problem.setting.dtype.itemsize)


def per_token_head(problem: Problem, cache_dtype: str) -> Made:
    cache, write, token_bytes = coded_writer(problem.setting, problem.num_blocks, cache_dtype)
    problem.fill(write)
    return _unified(problem, cache), token_bytes


def _unified(problem: Problem, cache: dict[str, Any]) -> Callable[[], torch.Tensor]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    setting, shape, requests = problem.setting, problem.shape, problem.requests
    most = MIN_LAUNCH_GRID_SIZE_2D // setting.geometry.kv_heads
    rows = (most, setting.geometry.query_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    floats = {"dtype": torch.float32, "device": setting.device}
    padded = 1 << (setting.geometry.head_size - 1).bit_length()
    output = problem.output
    arguments = {
        "q": problem.query,
        "out": output,
        "cu_seqlens_q": requests.query_start_loc,
        "max_seqlen_q": shape.queries,
        "seqused_k": requests.seq_lens,
        "max_seqlen_k": shape.context,
        "softmax_scale": setting.scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": requests.block_table,
        "softcap": 0,
        "q_descale": None,
        "seq_threshold_3D": most,
        "num_par_softmax_segments": NUM_PAR_SOFTMAX_SEGMENTS,
        "softmax_segm_output": torch.empty(*rows, padded, **floats),  # type: ignore[call-overload]
        "softmax_segm_max": torch.empty(*rows, **floats),  # type: ignore[call-overload]
        "softmax_segm_expsum": torch.empty(*rows, **floats),  # type: ignore[call-overload]
        **cache,
    }

    def run() -> torch.Tensor:
        unified_attention(**arguments)
        return output

    return run


def flash_attention_3(problem: Problem) -> Made:
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason

    reason = fa_version_unsupported_reason(3)
    if reason is not None:
        raise ImportError(reason)
    setting, shape, requests = problem.setting, problem.shape, problem.requests
    (keys, values), write = exact_writer(setting, problem.num_blocks)
    problem.fill(write)
    output = problem.output

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            q=problem.query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=requests.query_start_loc,
            max_seqlen_q=shape.queries,
            seqused_k=requests.seq_lens,
            max_seqlen_k=shape.context,
            softmax_scale=setting.scale,
            causal=True,
            block_table=requests.block_table,
            fa_version=3,
        )
        return output

    return run, setting.geometry.full_bytes(setting.dtype.itemsize)


def turboquant(problem: Problem, cache_dtype: str) -> Made:
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    setting, shape, geometry = problem.setting, problem.shape, problem.setting.geometry
    cache, write, token_bytes = turboquant_writer(setting, problem.num_blocks, cache_dtype)
    problem.fill(write)
    floats = {"dtype": torch.float32, "device": setting.device}
    rows = (shape.batch, geometry.query_heads)
    buffers = {
        "mid_o_buf": torch.empty(*rows, TURBOQUANT_SPLITS, geometry.head_size + 1, **floats),  # type: ignore[call-overload]
        "output_buf": torch.empty_like(problem.query),
        "lse_buf": torch.empty(*rows, **floats),  # type: ignore[call-overload]
    }

    def run() -> torch.Tensor:
        return triton_turboquant_decode_attention(
            query=problem.query,
            block_table=problem.requests.block_table,
            seq_lens=problem.requests.seq_lens,
            scale=setting.scale,
            max_num_kv_splits=TURBOQUANT_SPLITS,
            **cache,
            **buffers,
        )

    return run, token_bytes
