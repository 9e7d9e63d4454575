# SPDX-License-Identifier: Apache-2.0
"""Projecting and storing a step's tokens on a CPU: the launcher. Same contract as `store.project_and_store`."""

from __future__ import annotations

import numpy as np
import torch

from mkv_kernels.bases import LayerBases
from mkv_kernels.codes import scale_values
from mkv_kernels.compiled.decode import kind_of, side_fields, unsupported
from mkv_kernels.compiled.entry import run_on_threads
from mkv_kernels.compiled.store_worker import GROUP, STEP, compile_store, scratch_bytes


class StoreScratch:
    """What the layers of a model share: threads' own memory, and q' of a step. Grows with the largest step."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.projected: dict[torch.dtype, torch.Tensor] = {}

    def reserve(self, num_bytes: int, num_projected: int, dtype: torch.dtype) -> torch.Tensor:
        if num_bytes > len(self.bytes):
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        if dtype not in self.projected or num_projected > len(self.projected[dtype]):
            self.projected[dtype] = torch.empty(num_projected, dtype=dtype)
        return self.projected[dtype]


class LayerStore:
    """One layer's tables, on its way to the compiled worker."""

    def __init__(self, bases: LayerBases, num_heads: int, dtype: torch.dtype, scratch: StoreScratch) -> None:
        """Raises:
        NotImplementedError: `unsupported` says why.
        """
        if (reason := unsupported(dtype)) is not None:
            raise NotImplementedError(reason)
        self.bases, self.dtype, self.scratch = bases, dtype, scratch
        self.num_groups = len(bases.layout.widths)
        self.queries_per_head = num_heads // (self.num_groups * bases.group_heads)
        self._scales = scale_values(torch.arange(256, dtype=torch.uint8))
        self._zeros = torch.zeros(bases.group_heads * bases.head_size, dtype=torch.float32)
        self._counter = torch.empty(2, dtype=torch.int64)
        self._table, self._projected = np.zeros(self.num_groups, GROUP), np.empty(self.num_groups, np.int64)
        # The table has addresses of these.
        self._kept: list[torch.Tensor] = []
        for run in bases.runs:
            for place, g in enumerate(run.run.groups):
                row, layout = self._table[g], bases.layout.groups[g]
                row["key"], row["value"] = side_fields(layout.key), side_fields(layout.value)
                row["rank_k"], row["rank_v"] = run.rank_k, run.rank_v
                row["key_down"], row["key_shift"] = self._keep(run.key_down[place]), self._keep(-run.key_shift[place])
                row["value_down"] = 0 if run.value_down is None else self._keep(run.value_down[place])
                row["value_shift"] = self._keep(-run.value_shift[place])
                row["query_up"] = self._keep(run.query_up[place])
        self.worker = compile_store(kind_of(dtype))

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """k' and v' go to their slots.

        Shapes:
            query: [T, H, d], key and value: [T, groups * J, d]; tokens may lie any stride apart, heads are dense
            cache: as `pages.view_pages` takes it
            slots: [T] int64, block * block_size + offset; negative where nothing is stored

        Returns:
            q' for every run, [T, G, J, M, Rk], until the next call.
        """
        T, layout, bases = len(query), self.bases.layout, self.bases
        d, J, M, itemsize = bases.head_size, bases.group_heads, self.queries_per_head, self.dtype.itemsize
        for x in (query, key, value):
            assert x.dtype == self.dtype and x.stride(2) == 1 and x.stride(1) == d
        assert cache.dtype == self.dtype and slots.dtype == torch.int64 and slots.is_contiguous()
        threads, stride = torch.get_num_threads(), scratch_bytes(J * d)
        memory = self.scratch.reserve(
            threads * stride, T * J * M * sum(run.rank_k * len(run.run.groups) for run in bases.runs), self.dtype
        )
        projected, first = [], 0
        for run in bases.runs:
            G, per_group = len(run.run.groups), T * J * M * run.rank_k
            mine = memory[first : first + G * per_group].view(G, T, J, M, run.rank_k)
            for place, g in enumerate(run.run.groups):
                self._projected[g] = memory.data_ptr() + (first + place * per_group) * itemsize
            projected.append(mine.transpose(0, 1))
            first += G * per_group
        self._counter.zero_()
        step = np.array(
            (
                self._counter.data_ptr(),
                T,
                self.num_groups,
                J,
                M,
                d,
                query.data_ptr(),
                query.stride(0) * itemsize,
                key.data_ptr(),
                key.stride(0) * itemsize,
                value.data_ptr(),
                value.stride(0) * itemsize,
                slots.data_ptr(),
                self._table.ctypes.data,
                self._projected.ctypes.data,
                cache.data_ptr(),
                cache.stride(0) * itemsize,
                layout.block_size,
                self._scales.data_ptr(),
                self._zeros.data_ptr(),
                self.scratch.bytes.data_ptr(),
                stride,
            ),
            STEP,
        )
        run_on_threads(self.worker, step)
        return tuple(projected)
