# SPDX-License-Identifier: Apache-2.0
"""Decode attention on a CPU: the launcher. Same contract as `attend` for requests of few queries each."""

from __future__ import annotations

import math

import numpy as np
import torch

from mkv_kernels.bases import LayerBases
from mkv_kernels.compiled.chunk import CHUNK, num_fours
from mkv_kernels.compiled.entry import parallel, run_on_threads
from mkv_kernels.compiled.tile import ROWS, operand_bytes
from mkv_kernels.compiled.vector import BFLOAT16, FLOAT16, FLOAT32, LANES, PAIRS, UNIT, processor_has
from mkv_kernels.compiled.worker import GROUP, STEP, compile_worker, scratch_bytes
from mkv_kernels.layout import SideLayout, check_block_size
from mkv_kernels.schedule import Decodes

KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
TASKS_PER_THREAD = 4
"""So many at least where contexts are long: groups differ in bytes, and cores in what else they do."""
LEAST_SPLIT = 2 * CHUNK


def kind_of(dtype: torch.dtype) -> int:
    """What numbers of a dtype are to the processor."""
    if dtype == torch.bfloat16 and processor_has("avx512bf16") and processor_has("avx512bw"):
        return PAIRS
    return KINDS[dtype]


def unsupported(dtype: torch.dtype) -> str | None:
    """Why this machine or dtype is not served; None where it is."""
    if dtype not in KINDS:
        return f"there are no compiled kernels for {dtype}"
    if parallel() is None:
        return "PyTorch does not run on OpenMP threads here"
    return None


def side_fields(side: SideLayout) -> list[int]:
    """See `tile.SIDE_FIELDS`."""
    tiers = {region.width: (region.offset, region.size * region.width // 16) for region in side.regions}
    exact = tiers.get(16, (0, 0))[0], side.exact
    coded = [number for width in (8, 4, 2) for number in tiers.get(width, (0, 0))]
    return [*exact, *coded, -1 if side.scale_offset is None else side.scale_offset]


def _tile_sizes(key: SideLayout, value: SideLayout, rows: int, kind: int) -> dict[str, int]:
    """Of a tile of so many rows, see `worker.GROUP`."""
    fours = [num_fours.py_func(side_fields(side)) for side in (key, value)]
    coded_bytes = -(-4 * fours[0] * rows * operand_bytes(kind) // UNIT // 64) * 64
    units = [-(-side.exact // UNIT) * rows for side in (key, value)]
    return {
        "coded_bytes": coded_bytes,
        "query_bytes": coded_bytes + units[0] * operand_bytes(kind),
        "sums": fours[1] * LANES + units[1] * UNIT,
    }


class DecodeScratch:
    """What the layers of a model share beside the cache. Grows with the largest step, and is kept."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.partial = torch.empty(0, dtype=torch.float32)
        self.counters = torch.empty(0, dtype=torch.int64)

    def reserve(self, num_bytes: int, num_partial: int, num_counters: int) -> None:
        if num_bytes > len(self.bytes):
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        if num_partial > len(self.partial):
            self.partial = torch.empty(num_partial, dtype=torch.float32)
        if num_counters > len(self.counters):
            self.counters = torch.empty(num_counters, dtype=torch.int64)


class LayerDecode:
    """One layer's tables, on its way to the compiled worker."""

    def __init__(
        self,
        bases: LayerBases,
        scale: float,
        num_heads: int,
        dtype: torch.dtype,
        scratch: DecodeScratch,
        kind: int | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        """`kind` is one of `vector`'s, where it is not to be the processor's best.

        Args:
            window: tokens that a query sees, its own included; 0 for all up to it. Others are not read.
            soft_cap: scores become soft_cap tanh(score / soft_cap) before the softmax; 0 leaves them.

        Raises:
            NotImplementedError: `unsupported` says why.
            ValueError: the block size is no multiple of 16.
        """
        if (reason := unsupported(dtype)) is not None:
            raise NotImplementedError(reason)
        check_block_size(bases.layout)
        self.bases, self.dtype, self.scratch = bases, dtype, scratch
        self.num_groups = len(bases.layout.widths)
        self.num_rows = num_heads // self.num_groups
        self.kind = kind_of(dtype) if kind is None else kind
        # Powers of two, as `vector.lane_sums` wants them.
        self.rows = min(ROWS, 1 << (self.num_rows - 1).bit_length())
        self.tiled_rows = -(-self.num_rows // self.rows) * self.rows
        self._factor = torch.tensor([scale / math.log(2)], dtype=torch.float32)
        self.window = window
        # The worker multiplies by the scale later on.
        cap = [2 * scale / (soft_cap * math.log(2)), soft_cap / scale] if soft_cap else []
        self._cap = torch.tensor(cap, dtype=torch.float32)
        self._fill_table()
        self._queries = np.empty((self.num_groups, 2), dtype=np.int64)
        self.worker = compile_worker(self.kind, self.rows)

    def _fill_table(self) -> None:
        self._table = np.zeros(self.num_groups, GROUP)
        # The table has addresses of these.
        self._kept: list[torch.Tensor] = []

        def address(tensor: torch.Tensor) -> int:
            self._kept.append(tensor.contiguous())
            return self._kept[-1].data_ptr()

        for run in self.bases.runs:
            for place, g in enumerate(run.run.groups):
                row, layout = self._table[g], self.bases.layout.groups[g]
                row["key"], row["value"] = side_fields(layout.key), side_fields(layout.value)
                for name, size in _tile_sizes(layout.key, layout.value, self.rows, self.kind).items():
                    row[name] = size
                row["rank_k"], row["rank_v"] = layout.key.rank, layout.value.rank
                row["up"] = 0 if run.value_up is None else address(run.value_up[place])
                row["mean"] = address(run.value_mean[place])
        self.query_bytes, self.sums, self.rank_v = (
            int(self._table[name].max()) for name in ("query_bytes", "sums", "rank_v")
        )

    def __call__(
        self, query: tuple[torch.Tensor, ...], cache: torch.Tensor, decodes: Decodes, output: torch.Tensor
    ) -> None:
        """output = softmax(q' k'^T scale) v' D + mean, for the tokens of `decodes` and every query head.

        Shapes:
            query:  q' for every run, [T, G, J, M, Rk]
            cache:  as `pages.view_pages` takes it
            output: [T, H, d]; as `attend` leaves it
        """
        assert cache.dtype == output.dtype == self.dtype
        assert output.is_contiguous() or output[0].is_contiguous()
        assert decodes.block_table.dtype == torch.int32 and decodes.block_table.stride(1) == 1
        itemsize, layout, num_queries = self.dtype.itemsize, self.bases.layout, len(decodes.tokens)
        query = tuple(q if q[0, 0].is_contiguous() else q.contiguous() for q in query)
        for q, run in zip(query, self.bases.runs, strict=True):
            assert q.dtype == self.dtype
            for place, g in enumerate(run.run.groups):
                self._queries[g] = q.data_ptr() + place * q.stride(1) * itemsize, q.stride(0) * itemsize
        threads = torch.get_num_threads()
        pairs = num_queries * self.num_groups
        longest = min(decodes.max_length, self.window or decodes.max_length)
        splits = min(-(-TASKS_PER_THREAD * threads // pairs), max(1, longest // LEAST_SPLIT))
        split = -(-longest // (splits * CHUNK)) * CHUNK
        stride, partial_stride = (
            scratch_bytes(self.tiled_rows // self.rows, self.rows, self.query_bytes, self.sums),
            -(-(self.rank_v + 2) // LANES) * LANES,
        )
        scratch = self.scratch
        scratch.reserve(threads * stride, pairs * splits * self.tiled_rows * partial_stride, 2 + pairs)
        scratch.counters[: 2 + pairs] = 0
        step = np.array(
            (
                scratch.counters.data_ptr(),
                num_queries,
                self.num_groups,
                self.bases.group_heads,
                self.num_rows,
                self.bases.head_size,
                splits,
                split,
                self._table.ctypes.data,
                self._queries.ctypes.data,
                decodes.requests.data_ptr(),
                decodes.tokens.data_ptr(),
                decodes.lengths.data_ptr(),
                self.window,
                decodes.block_table.data_ptr(),
                decodes.block_table.stride(0),
                cache.data_ptr(),
                cache.stride(0) * itemsize,
                layout.block_size,
                self._factor.data_ptr(),
                self._cap.data_ptr() if len(self._cap) else 0,
                scratch.bytes.data_ptr(),
                stride,
                scratch.partial.data_ptr(),
                partial_stride,
                output.data_ptr(),
                output.stride(0) * itemsize,
                self.query_bytes,
                self.sums,
            ),
            STEP,
        )
        run_on_threads(self.worker, step)
