# SPDX-License-Identifier: Apache-2.0
"""Views of a layer's cache, one per run of latent groups and side, at the offsets that the page layout names."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mkv_kernels.codes import decode, encode
from mkv_kernels.layout import SCALE_BYTES, GroupRun, PageLayout, SideLayout


@dataclass(frozen=True)
class SidePages:
    """Keys or values of a run.

    Shapes:
        exact:  [num_blocks, G, block_size, R16] of the model's dtype, the 16-bit tier
        coded:  per tier of fewer bits, int16 [num_blocks, G, block_size, words per token]; tokens are neighbours
        scales: [num_blocks, G, block_size] uint8; None where no tier is of fewer bits
    """

    layout: SideLayout
    exact: torch.Tensor
    coded: tuple[torch.Tensor, ...]
    scales: torch.Tensor | None

    def write(self, block: torch.Tensor, offset: torch.Tensor, x: torch.Tensor) -> None:
        """Coordinates `x` [S, G, R] float32 of tokens that go to place `offset` [S] of page `block` [S]."""
        exact, packed, scale = encode(x, self.layout)
        if self.exact.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            exact = exact.clamp(-largest, largest)
        self.exact[block, :, offset] = exact.to(self.exact.dtype)
        for tier, codes in zip(self.coded, packed, strict=True):
            tier[block, :, offset] = codes
        if scale is not None and self.scales is not None:
            self.scales[block, :, offset] = scale

    def read(self, blocks: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `length` tokens of the pages `blocks` [B, P], as `codes.decode` gives them: [G, B, length, R]."""

        def gather(pages: torch.Tensor) -> torch.Tensor:
            return pages.transpose(0, 1)[:, blocks].flatten(2, 3)[:, :, :length]

        scales = None if self.scales is None else gather(self.scales)
        return decode(gather(self.exact), [gather(tier) for tier in self.coded], scales, self.layout, dtype)


@dataclass(frozen=True)
class RunPages:
    key: SidePages
    value: SidePages


def view_pages(cache: torch.Tensor, layout: PageLayout) -> tuple[RunPages, ...]:
    """Views of a cache for every run of the layout.

    Args:
        cache: [num_blocks, 1, block_size, bytes_per_token / itemsize] of the model's dtype; blocks may lie any stride
            apart, the page itself must be dense.

    Raises:
        ValueError: the cache is not of the layout's shape.
    """
    elements = layout.bytes_per_token // layout.itemsize
    expected = (1, layout.block_size, elements)
    if tuple(cache.shape[1:]) != expected or cache.element_size() != layout.itemsize:
        raise ValueError(
            f"the cache is {list(cache.shape)} of {cache.dtype}; its pages should be {list(expected)} of "
            f"{layout.itemsize} bytes"
        )
    if cache.stride(3) != 1 or cache.stride(2) != elements:
        raise ValueError(
            f"the cache's pages are not dense (strides {cache.stride()}); use a layer-compact KV cache layout"
        )
    memory = cache.view(torch.uint8)
    return tuple(
        RunPages(*(_view(memory, cache.dtype, run, side, layout) for side in (run.first.key, run.first.value)))
        for run in layout.runs
    )


def _view(memory: torch.Tensor, dtype: torch.dtype, run: GroupRun, side: SideLayout, layout: PageLayout) -> SidePages:
    num_blocks, num_groups, block_size = memory.shape[0], len(run.groups), layout.block_size

    def view(offset: int, dtype: torch.dtype, size: int, strides: tuple[int, int]) -> torch.Tensor:
        numbers, itemsize = memory.view(dtype), dtype.itemsize
        return numbers.as_strided(
            (num_blocks, num_groups, block_size, size),
            (numbers.stride(0), run.stride // itemsize, *strides),
            numbers.storage_offset() + offset // itemsize,
        )

    exact = memory.new_empty((num_blocks, num_groups, block_size, 0), dtype=dtype)
    if side.exact:
        exact = view(side.regions[0].offset, dtype, side.exact, (side.exact, 1))
    coded = tuple(
        view(region.offset, torch.int16, region.size * region.width // 16, (1, block_size)) for region in side.coded
    )
    scales = None
    if side.scale_offset is not None:
        scales = view(side.scale_offset, torch.uint8, SCALE_BYTES, (SCALE_BYTES, 1)).squeeze(-1)
    return SidePages(side, exact, coded, scales)
