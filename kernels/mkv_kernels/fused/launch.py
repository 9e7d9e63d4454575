# SPDX-License-Identifier: Apache-2.0
"""What every launcher checks and derives: shapes, dtypes, strides and devices, with errors that name the mend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mkv_kernels.fused.table import INTEGER_ROWS, LayerTable, Shapes, power_of_two
from mkv_kernels.layout import ALIGNMENT

LOG2_E = math.log2(math.e)
SHARED_BYTES, ROOMY_SHARED_BYTES = 88 * 1024, 160 * 1024
"""Of pages and queries; what the compiler adds stays below 11 KB. 99 KB are what every GPU since 2020 has, 227 KB those
of data centres since Hopper."""
INTEGER_REGISTERS = 128
"""Per thread, for small layers in `integer`: 16 programs then share a multiprocessor."""
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pages:
    """A cache as the kernels take it: the same memory as elements of the model's dtype and as words of 16 bits."""

    pages: tuple[torch.Tensor, torch.Tensor]
    strides: tuple[int, int]
    """From block to block, in the same units."""


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly in a float32 model, with 10 bits of mantissa in others.

    The others' own numbers have 10 bits at most, so that only the bases are rounded.
    """
    return "ieee" if dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for, which its tiles are chosen by.

    backend: Triton's name of it, "cuda" or "hip"; "" where a kernel is interpreted.
    generation: of NVIDIA's, 8 for Ampere, 9 for Hopper, 10 and more for Blackwell; 0 elsewhere.
    """

    backend: str
    generation: int

    @classmethod
    def of(cls, kernel: Any) -> Target:
        if not isinstance(kernel, JITFunction):
            return cls("", 0)
        target = driver.active.get_current_target()
        return cls(target.backend, int(target.arch) // 10 if target.backend == "cuda" else 0)

    @property
    def roomy(self) -> bool:
        """Whether it has the shared memory of Hopper and of Blackwell in data centres; consumers' Blackwell has not."""
        return self.generation in (9, 10)

    @property
    def has_exact_loop(self) -> bool:
        """Whether prefill attends as `exact` says; data centres' Blackwell's compiler would spill registers."""
        return self.generation != 10

    @property
    def prefill_bytes(self) -> int:
        """Shared memory that a program of prefill may take; of decode, several should fit."""
        return ROOMY_SHARED_BYTES if self.roomy else SHARED_BYTES

    def joins_values(self, dtype: torch.dtype) -> bool:
        """Whether `exact` takes two tiles of values as one. Of more products per tile of tokens, the assembler that is
        Triton's from 3.9 on (of CUDA 13.3 and later) has Hopper wait for each, for want of registers."""
        return self.generation == 9 and dtype != torch.float32 and TRITON >= (3, 9)

    def unpacks_in_ptx(self, dtype: torch.dtype) -> bool:
        """Where there is PTX; it computes in 16 bits."""
        return self.backend == "cuda" and dtype != torch.float32

    def raises_values(self, dtype: torch.dtype) -> bool:
        """Whether codes of values keep their excess until many are summed; float16's is too large for that."""
        return self.unpacks_in_ptx(dtype) and dtype == torch.bfloat16


@dataclass(frozen=True)
class Tiles:
    """What a program takes at once: `rows` of queries and `tokens`, loaded in `stages`, by `warps` warps of `registers`
    per thread at most, where that is said; one `in_warp` attends as `warp` says, one `in_integers` as `integer` does.

    The numbers follow from what the compiler makes of the kernels (see `kernels/compile_check.py`), and from times on
    an H100: accumulators of all value columns stay in registers; four warps with 128 rows are faster than eight.
    """

    rows: int
    tokens: int
    stages: int
    warps: int
    in_warp: bool = False
    in_integers: bool = False
    registers: int | None = None

    @classmethod
    def of_decode(cls, shapes: Shapes, rows: int, itemsize: int, target: Target) -> Tiles:
        integers = shapes.integers
        if integers is not None and rows <= INTEGER_ROWS and itemsize == 2 and target.backend != "hip":
            registers = INTEGER_REGISTERS if integers.is_small else None
            return cls(INTEGER_ROWS, integers.tokens, integers.stages, 1, in_integers=True, registers=registers)
        if cls._in_warp(shapes, itemsize, target) and (shapes.coded or rows <= 16):
            return cls._of_warp(shapes, rows)
        if shapes.coded:
            return cls._of_coded(shapes, 16, itemsize, target)
        columns = max(16, shapes.value.columns)
        rows = min(64, max(16, power_of_two(rows)))
        if rows * columns > 64 * 320 or not _fits(shapes, rows, 64, 3, itemsize, SHARED_BYTES):
            rows = 16
        # Two warps wait less for each other.
        warps = 2 if rows == 16 and columns <= 128 and target.backend != "hip" else _warps(rows, columns, target)
        return cls(rows, *_tokens(shapes, rows, 64, itemsize, SHARED_BYTES), warps)

    @classmethod
    def of_prefill(cls, shapes: Shapes, query_heads: int, itemsize: int, target: Target, *, folded: bool) -> Tiles:
        # A tile holds whole tokens.
        least = power_of_two(query_heads)
        if shapes.coded and least <= 16 and cls._in_warp(shapes, itemsize, target):
            return cls._of_warp(shapes, 16)
        if shapes.coded:
            return cls._of_coded(shapes, max(16, least), itemsize, target)
        columns = shapes.value.columns
        rows = 128 if columns <= 192 else 64 if columns <= 384 else 16
        if target.generation == 8 and columns > 192:
            # Before Hopper, every warp holds q' of all coordinates.
            rows = min(rows, 32)
        elif target.backend == "hip":
            rows = min(rows, 64)
        rows = max(rows, least)
        warps = _warps(rows, columns, target)
        if target.roomy and folded and rows == 128 and columns <= 128:
            # Registers suffice as long as no product with D follows.
            return cls(rows, *_tokens(shapes, rows, 64, itemsize, target.prefill_bytes), 4)
        if target.generation >= 9 and shapes.value.chunks[0] > 64:
            # The product with as many rows of D leaves 4 no registers.
            warps = 8
        return cls(rows, *_tokens(shapes, rows, 32, itemsize, target.prefill_bytes), warps)

    @staticmethod
    def _in_warp(shapes: Shapes, itemsize: int, target: Target) -> bool:
        # AMD's operands have 16 columns at least, and NVIDIA's have no tensor cores for float32.
        return shapes.operands is not None and (not target.backend or (target.backend == "cuda" and itemsize == 2))

    @classmethod
    def _of_warp(cls, shapes: Shapes, rows: int) -> Tiles:
        operands = shapes.operands
        assert operands is not None
        if rows <= 8:
            return cls(8, operands.tokens, operands.stages, 1, in_warp=True)
        # Accumulators of 16 rows, and as many tokens' codes at once, would be more than a thread's registers.
        return cls(16, 16 if shapes.coded else operands.tokens, operands.stages, 1, in_warp=True)

    @classmethod
    def _of_coded(cls, shapes: Shapes, rows: int, itemsize: int, target: Target) -> Tiles:
        # More rows would share the unpacked codes, but Hopper's products of 64 rows take them from shared memory, where
        # they would have to go first, and accumulators of 32 leave no registers. AMD's compiler spills 64 tokens; as to
        # its warps, see `_warps`.
        most_tokens, most_warps = (32, 4) if target.backend == "hip" else (64, 8)
        warps = min(most_warps, shapes.warps * rows // 16)
        return cls(rows, *_tokens(shapes, rows, min(most_tokens, shapes.tokens), itemsize, SHARED_BYTES), warps)


def _warps(rows: int, columns: int, target: Target) -> int:
    # AMD's have 64 threads: of more than 4, each has half the registers.
    return 4 if (rows == 16 and columns <= 560) or target.backend == "hip" else 8


def _fits(shapes: Shapes, rows: int, tokens: int, stages: int, itemsize: int, most_bytes: int) -> bool:
    key_bytes, value_bytes = (tokens * side.loaded_bytes(itemsize) for side in (shapes.key, shapes.value))
    queries = rows * shapes.key.columns * itemsize
    if stages == 1:
        return max(key_bytes, value_bytes) + queries <= most_bytes
    # Values of the 16-bit tier are read from shared memory while the next ones arrive there; keys, and what is to be
    # unpacked, are in registers by then.
    value_bytes += tokens * shapes.value.chunks[0] * shapes.value.tiles[0] * itemsize
    return key_bytes + value_bytes + queries <= most_bytes


def _tokens(shapes: Shapes, rows: int, most: int, itemsize: int, most_bytes: int) -> tuple[int, int]:
    """Tokens of a tile and stages of their loads: as many tokens as fit while the next ones arrive, or 32, or 16.

    Triton takes 3 stages for pages that are found through a block table: that is looked up two tiles ahead, what it
    says is copied one ahead.
    """
    sizes = [(tokens, 3) for tokens in (64, 32, 16) if tokens <= most]
    if shapes.coded:
        sizes[-1] = (32, 1)
    return next((size for size in sizes if _fits(shapes, rows, *size, itemsize, most_bytes)), (16, 1))


def check_cache(cache: torch.Tensor, table: LayerTable) -> Pages:
    layout = table.layout
    expected = (1, layout.block_size, layout.bytes_per_token // layout.itemsize)
    if tuple(cache.shape[1:]) != expected or cache.element_size() != layout.itemsize:
        raise ValueError(
            f"the cache is {list(cache.shape)} of {cache.dtype}; its pages should be {list(expected)} of "
            f"{layout.itemsize} bytes"
        )
    if cache.stride(3) != 1 or cache.stride(2) != expected[2]:
        raise ValueError(
            f"the cache's pages are not dense (strides {cache.stride()}); use a layer-compact KV cache layout"
        )
    stride = cache.stride(0) * layout.itemsize
    if cache.data_ptr() % ALIGNMENT or stride % ALIGNMENT:
        raise ValueError(
            f"the cache starts at {cache.data_ptr() % ALIGNMENT} bytes beyond a multiple of {ALIGNMENT} and its blocks "
            f"lie {stride} bytes apart; both must be multiples of {ALIGNMENT}: pad the pages"
        )
    if stride >= 1 << 32:
        raise ValueError(f"the cache's blocks lie {stride} bytes apart; kernels take up to 4 GiB: use smaller blocks")
    return Pages((cache, cache.view(torch.int16)), (stride // layout.itemsize, stride // 2))


def check_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: LayerTable,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    output: torch.Tensor,
) -> Pages:
    """Raises ValueError unless the arguments of decode and prefill fit each other."""
    T, G, J, M, R = query.shape
    if table.num_groups != G or table.group_heads != J or table.rank_k > R:
        raise ValueError(
            f"q' is {list(query.shape)}; this layer has {table.num_groups} latent groups of {table.group_heads} KV "
            f"heads and key ranks up to {table.rank_k}: use the buffer that `store` filled for this layer"
        )
    if query.stride(4) != 1 or query.stride(2) != M * query.stride(3):
        raise ValueError(f"the heads of a group must be rows of one stride in q' (strides {query.stride()})")
    if tuple(output.shape) != (T, G * J * M, table.head_size):
        raise ValueError(f"the output is {list(output.shape)}; it should be {[T, G * J * M, table.head_size]}")
    if output.stride(2) != 1 or output.stride(1) != table.head_size:
        raise ValueError(f"the output's heads are not dense (strides {output.stride()}); pass a dense tensor")
    check_dtypes({"q'": query, "the cache": cache, "the output": output})
    B = seq_lens.shape[0]
    if query_start_loc.shape != (B + 1,) or block_table.shape[0] != B:
        raise ValueError(
            f"{B} sequence lengths, {query_start_loc.shape[0]} query starts and {block_table.shape[0]} rows of the "
            "block table; there must be one of each per request, and one more query start"
        )
    integers = {"block_table": block_table, "seq_lens": seq_lens, "query_start_loc": query_start_loc}
    check_integers(integers)
    check_devices({"q'": query, "the cache": cache, "the output": output, **integers}, table)
    return check_cache(cache, table)


def check_expansion(
    cache: torch.Tensor,
    table: LayerTable,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    expanded: torch.Tensor,
    expanded_layer: LayerTable,
    expanded_table: torch.Tensor,
) -> tuple[Pages, Pages]:
    """Raises ValueError unless the arguments of `expand` fit each other; the pages of both."""
    heads = table.num_groups * table.group_heads
    own = (heads, table.head_size, table.layout.block_size)
    if (expanded_layer.num_groups, expanded_layer.head_size, expanded_layer.layout.block_size) != own:
        raise ValueError(
            f"the expansion is of another layer: this one has {heads} KV heads of {table.head_size} in pages of "
            f"{table.layout.block_size} tokens; take `Expansion.of` its table"
        )
    check_dtypes({"the cache": cache, "the expanded pages": expanded})
    B, integers = seq_lens.shape[0], {"block_table": block_table, "expanded_table": expanded_table}
    check_integers({**integers, "seq_lens": seq_lens})
    for name, tensor in integers.items():
        if tensor.shape[0] != B:
            raise ValueError(f"{B} sequence lengths, and {tensor.shape[0]} rows of {name}; there must be one of each")
    tensors = {"the cache": cache, "the expanded pages": expanded, "seq_lens": seq_lens, **integers}
    check_devices(tensors, table)
    return check_cache(cache, table), check_cache(expanded, expanded_layer)


def check_prefill(shapes: Shapes, dtype: torch.dtype, target: Target) -> None:
    """Raises NotImplementedError for pages that `prefill` was seen to read wrongly on a GPU."""
    if dtype == torch.float32 and shapes.coded and target.backend:
        raise NotImplementedError(
            "prefill of float32 over codes: on an H100 its result was off by 1 % for one layer, it is not known why; "
            "serve the model in bfloat16 or float16, or expand its pages first (no window, up to 65536 tokens)"
        )


def check_scores(scale: float, window: int, soft_cap: float) -> None:
    if scale <= 0:
        raise ValueError(f"a scale of {scale}; scores are multiplied by one above 0")
    if window < 0 or soft_cap < 0:
        raise ValueError(f"a window of {window} and a soft-cap of {soft_cap}; pass 0 for none")


def check_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    table: LayerTable,
    slots: torch.Tensor,
    projected: torch.Tensor,
) -> Pages:
    """Raises ValueError unless the arguments of the store fit each other."""
    T, H, d = query.shape
    G, J = table.num_groups, table.group_heads
    kv_heads = [T, G * J, table.head_size]
    if d != table.head_size or H % (G * J) or [*key.shape] != kv_heads or [*value.shape] != kv_heads:
        raise ValueError(
            f"q {list(query.shape)}, k {list(key.shape)}, v {list(value.shape)}; this layer has {G} latent groups of "
            f"{J} KV heads of {table.head_size}"
        )
    for name, tensor in {"q": query, "k": key, "v": value}.items():
        if tensor.stride(2) != 1 or tensor.stride(1) != d:
            raise ValueError(f"the heads of {name} are not dense (strides {tensor.stride()}); only tokens may be apart")
    M, R = H // (G * J), projected.shape[4]
    if tuple(projected.shape[:4]) != (T, G, J, M) or table.rank_k > R:
        raise ValueError(
            f"the buffer of q' is {list(projected.shape)}; it should be {[T, G, J, M]} by {table.rank_k} at least"
        )
    if projected.stride(4) != 1 or projected.stride(2) != M * projected.stride(3):
        raise ValueError(f"the heads of a group must be rows of one stride in q' (strides {projected.stride()})")
    if slots.shape != (T,) or slots.dtype != torch.int64 or slots.stride(0) != 1:
        raise ValueError(f"slots are {list(slots.shape)} of {slots.dtype}; there should be one dense int64 per token")
    check_dtypes({"q": query, "k": key, "v": value, "q'": projected, "the cache": cache})
    tensors = {"q": query, "k": key, "v": value, "q'": projected, "the cache": cache, "slots": slots}
    check_devices(tensors, table)
    return check_cache(cache, table)


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or not set(dtypes.values()) <= set(DTYPES):
        raise ValueError(f"dtypes {dtypes}: all must be the same one of {DTYPES}")


def check_integers(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; it should be dense int32")


def check_devices(tensors: dict[str, torch.Tensor], table: LayerTable) -> None:
    elsewhere = [name for name, tensor in tensors.items() if tensor.device != table.regions.device]
    if elsewhere:
        raise ValueError(f"{', '.join(elsewhere)} not on {table.regions.device}, where the layer's bases are")


def check_buffers(buffers: dict[str, torch.Tensor], sizes: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless the buffers of a workspace are dense, on the device, and large enough.

    They are float32, but for those that count.
    """
    for (name, buffer), size in zip(buffers.items(), sizes, strict=True):
        dtype = torch.int32 if name == "counters" else torch.float32
        if buffer.dtype != dtype:
            raise ValueError(f"the workspace's {name} is {buffer.dtype}; it should be {dtype}")
        if buffer.numel() < size or not buffer.is_contiguous() or buffer.device != device:
            raise ValueError(
                f"the workspace's {name} holds {buffer.numel()} numbers on {buffer.device}; this launch needs {size}, "
                f"dense, on {device}: make the workspace for the largest launch"
            )
