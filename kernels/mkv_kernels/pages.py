# SPDX-License-Identifier: Apache-2.0
"""Views of a layer's cache, one per run of latent groups and side, at the offsets that the page layout names."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mkv_kernels.layout import GroupRun, PageLayout, SideLayout


@dataclass(frozen=True)
class RunPages:
    """The 16-bit tiers of a run: keys [num_blocks, G, block_size, Rk] and values [num_blocks, G, block_size, Rv]."""

    key: torch.Tensor
    value: torch.Tensor


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
    return tuple(
        RunPages(_view(cache, run, run.first.key, layout), _view(cache, run, run.first.value, layout))
        for run in layout.runs
    )


def _view(cache: torch.Tensor, run: GroupRun, side: SideLayout, layout: PageLayout) -> torch.Tensor:
    num_blocks, block_size = cache.shape[0], layout.block_size
    if not side.regions:
        return cache.new_empty((num_blocks, len(run.groups), block_size, 0))
    if any(region.width != 16 for region in side.regions):
        raise NotImplementedError(
            f"coordinates of {[region.width for region in side.regions]} bits; this version computes with 16 alone, "
            "so use an adapter whose allocation path has the widths 16 and 0"
        )
    region = side.regions[0]
    return cache.as_strided(
        (num_blocks, len(run.groups), block_size, region.size),
        (cache.stride(0), run.stride // layout.itemsize, region.size, 1),
        cache.storage_offset() + region.offset // layout.itemsize,
    )
