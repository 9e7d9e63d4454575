# SPDX-License-Identifier: Apache-2.0
"""Where every byte of a page lies. The only place that knows offsets.

A page holds `block_size` tokens of one layer. Inside it, group-major, lie for each latent group the key's and then the
value's regions, one per tier: `[block_size, coordinates]` for the tier of 16 bits, `[words, block_size]` for the
others, in words of 16 bits (see `codes`); and last, for a side that has coordinates of fewer than 16 bits, one region
of per-token scales, one byte each. Every region starts on a 16-byte boundary. Words of neighbouring tokens are
neighbours, so that kernels can load 16 bytes at once whatever the size of a tier. Scales are behind the words of both
sides, since those of 16 tokens take 16 bytes: before the value's, they would lay each word of 16 tokens, 32 bytes,
across two of the sectors that a GPU reads. Latent groups of equal widths are neighbours, so that a run of them is one
strided view.

    page of a layer with two latent groups; group 1 has a 16-bit and a 4-bit tier, group 0 only 16-bit tiers

    | group 0                        | group 1                                                                     |
    | key 16 bit     | value 16 bit  | key 16 bit | key 4 bit | value 16 bit | value 4 bit | key scales | value scales |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

BLOCK = 16
"""Coordinates that share one width: the unit of allocation, and what `rank_step` counts."""
WIDTHS = (16, 8, 4, 2, 0)
"""Bits a coordinate may have. 16 stands for the model's own dtype, whatever its size."""
ALIGNMENT = 16
"""Bytes. Every region of a page starts on a multiple of this."""
PAGE_STEP = 16
"""Tokens. What kernels other than the twins need every block size to be a multiple of: they take as many at once."""
SCALE_BYTES = 1
"""Per token, latent group and side with quantised coordinates; `codes.scale_codes` says how a scale fits in a byte."""
KEY, VALUE = 0, 1

BlockWidths = tuple[int, ...]
"""Widths of one side's blocks of 16 coordinates, most important first; never increasing."""
GroupWidths = tuple[BlockWidths, BlockWidths]
"""Widths of a latent group's key blocks and value blocks."""


def rank_of(widths: BlockWidths) -> int:
    """Coordinates that are stored at all, at whatever width."""
    return BLOCK * sum(width > 0 for width in widths)


def side_bytes(widths: BlockWidths, itemsize: int) -> int:
    """Bytes per token of one side of one latent group, scales included; `itemsize` is that of the model's dtype."""
    bits = sum(8 * itemsize if width == 16 else width for width in widths) * BLOCK
    return bits // 8 + (SCALE_BYTES if any(0 < width < 16 for width in widths) else 0)


def _align(offset: int, to: int = ALIGNMENT) -> int:
    return -(-offset // to) * to


@dataclass(frozen=True)
class Region:
    """Coordinates `[start, start + size)` of one side of a latent group, `width` bits each."""

    width: int
    start: int
    size: int
    offset: int
    """Bytes from the start of the page."""


@dataclass(frozen=True)
class SideLayout:
    widths: BlockWidths
    regions: tuple[Region, ...]
    scale_offset: int | None
    """Bytes from the start of the page to the per-token scales; None where no coordinate is quantised."""

    @property
    def rank(self) -> int:
        return rank_of(self.widths)

    @property
    def exact(self) -> int:
        """Coordinates of the 16-bit tier."""
        return BLOCK * self.widths.count(16)

    @property
    def coded(self) -> tuple[Region, ...]:
        """Regions of the tiers of fewer bits, in the order of their coordinates."""
        return tuple(region for region in self.regions if region.width < 16)


@dataclass(frozen=True)
class GroupLayout:
    group: int
    """Index of the latent group within the layer's shard."""
    offset: int
    key: SideLayout
    value: SideLayout


@dataclass(frozen=True)
class GroupRun:
    """Latent groups of equal widths, `stride` bytes apart in the page, so that one strided view holds them all."""

    groups: tuple[int, ...]
    first: GroupLayout
    stride: int


@dataclass(frozen=True)
class PageLayout:
    """Layout of the pages of one layer on one tensor-parallel rank.

    Args:
        widths: per latent group, the block widths of its keys and of its values.
        block_size: tokens per page.
        itemsize: bytes of the model's dtype, which the 16-bit tier has.
        padded_bytes_per_token: bytes per token to declare where that is more than this layout needs: a layer's pages
            must be of one size on every tensor-parallel rank.
    """

    widths: tuple[GroupWidths, ...]
    block_size: int
    itemsize: int
    padded_bytes_per_token: int = 0

    @cached_property
    def groups(self) -> tuple[GroupLayout, ...]:
        """In the order of their indices."""
        return tuple(sorted(self._in_page_order, key=lambda layout: layout.group))

    @cached_property
    def _in_page_order(self) -> tuple[GroupLayout, ...]:
        offset, layouts = 0, []
        for group in sorted(range(len(self.widths)), key=lambda g: (self.widths[g], g), reverse=True):
            start = offset
            keys, values = self.widths[group]
            key_regions, offset = self._regions(keys, offset)
            value_regions, offset = self._regions(values, offset)
            key_scales, offset = self._scales(key_regions, offset)
            value_scales, offset = self._scales(value_regions, offset)
            key, value = SideLayout(keys, key_regions, key_scales), SideLayout(values, value_regions, value_scales)
            layouts.append(GroupLayout(group, start, key, value))
        return tuple(layouts)

    def _regions(self, widths: BlockWidths, offset: int) -> tuple[tuple[Region, ...], int]:
        """Of one side, and where the next ones begin."""
        regions, start = [], 0
        for width in WIDTHS[:-1]:
            size = BLOCK * widths.count(width)
            if size:
                regions.append(Region(width, start, size, offset))
                bits = 8 * self.itemsize if width == 16 else width
                offset = _align(offset + self.block_size * size * bits // 8)
                start += size
        return tuple(regions), offset

    def _scales(self, regions: tuple[Region, ...], offset: int) -> tuple[int | None, int]:
        if all(region.width == 16 for region in regions):
            return None, offset
        return offset, _align(offset + self.block_size * SCALE_BYTES)

    @cached_property
    def runs(self) -> tuple[GroupRun, ...]:
        """Latent groups gathered by equal widths, in page order."""
        by_widths: dict[GroupWidths, list[GroupLayout]] = {}
        for layout in self._in_page_order:
            by_widths.setdefault(self.widths[layout.group], []).append(layout)
        return tuple(
            GroupRun(tuple(g.group for g in run), run[0], run[1].offset - run[0].offset if len(run) > 1 else 0)
            for run in by_widths.values()
        )

    @cached_property
    def content_bytes(self) -> int:
        """Bytes of a page that belong to some region, alignment between regions included."""
        last = self._in_page_order[-1]
        ends = [last.offset]
        for side in (last.key, last.value):
            for region in side.regions:
                bits = 8 * self.itemsize if region.width == 16 else region.width
                ends.append(region.offset + self.block_size * region.size * bits // 8)
            if side.scale_offset is not None:
                ends.append(side.scale_offset + self.block_size * SCALE_BYTES)
        return max(ends)

    @cached_property
    def bytes_per_token(self) -> int:
        """What the cache spec declares: page size divided by `block_size`; scales, alignment and padding included."""
        # A token's share must be whole, and divisible by the item size so that the page can be viewed in its dtype.
        own = _align(-(-self.content_bytes // self.block_size), self.itemsize)
        return max(own, self.padded_bytes_per_token)

    @property
    def page_bytes(self) -> int:
        return self.bytes_per_token * self.block_size


def uniform_widths(num_groups: int, rank_k: int, rank_v: int, group_width: int) -> tuple[GroupWidths, ...]:
    """16 bits for the first `rank_k` and `rank_v` coordinates of every latent group, of `group_width` each."""

    def side(rank: int) -> BlockWidths:
        return tuple(16 if BLOCK * block < rank else 0 for block in range(group_width // BLOCK))

    return tuple((side(rank_k), side(rank_v)) for _ in range(num_groups))


def check_widths(widths: Sequence[int], group_width: int) -> None:
    """Raises ValueError unless `widths` are block widths for a latent group of `group_width` coordinates."""
    if len(widths) != group_width // BLOCK:
        raise ValueError(f"{len(widths)} block widths for a latent group of {group_width // BLOCK} blocks")
    if any(width not in WIDTHS for width in widths):
        raise ValueError(f"block widths {tuple(widths)} are not all among {WIDTHS}")
    if any(a < b for a, b in pairwise(widths)):
        raise ValueError(f"block widths {tuple(widths)} increase along the order of importance")


def check_block_size(layout: PageLayout) -> None:
    """Raises ValueError where kernels other than the twins do not serve it."""
    if layout.block_size % PAGE_STEP:
        raise ValueError(f"pages of {layout.block_size} tokens; use a block size that is a multiple of {PAGE_STEP}")
