# SPDX-License-Identifier: Apache-2.0
"""What the kernels need to know of a layer, on the device: regions, padded bases, and who works on what.

Groups differ in their ranks and tiers, so kernels read a group's offsets and sizes from a table at run time; compiled
into them are only the layer's maxima. A row of the table has `SIDE_FIELDS` numbers for the keys, then as many for the
values:

    offset and size of the tier of 16, 8, 4 and 2 bits; offset of the token scales

Offsets are from the start of a page: in elements of the model's dtype for 16 bits, in words of 16 bits for all others.
Sizes are coordinates for 16 bits and words per token for the others, 0 where a group has no such tier; the scales'
offset is -1 where it has none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mkv_kernels.bases import LayerBases, RunBases
from mkv_kernels.fused.splits import work_of
from mkv_kernels.layout import WIDTHS, GroupLayout, PageLayout, SideLayout, check_block_size

SIDE_FIELDS = 9
TIERS = WIDTHS[:-1]
ITEM_COLUMNS = (32, 64)
"""Columns of a projection that one program of the store computes: few where tokens are few, to keep a GPU busy."""
TILES = (64, 128)
"""Coordinates of the 16-bit tier that are loaded at once: the more where padding does not grow by it, so that few
tokens are enough for every thread to load 16 bytes, and heads are not large, for prefill multiplies as many rows of D.
"""
LOADED_WORDS = (16, 32)
"""Words of a coded tier per token that are loaded at once: the more where padding does not grow by it."""
KEY_WORDS, VALUE_WORDS = 32, 16
"""Words of all coded tiers that `integer` loads at once: what its products sum over, and rows of them."""
QUERY, KEY, VALUE = 0, 1, 2
"""What an item of the store's work projects."""

_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class SideShape:
    """Maxima of one side over a layer's groups, which are compiled into the kernels; per tier of 16, 8, 4, 2 bits.

    chunks: coordinates (16 bits) or words (others) that are loaded at once; 0 where no group has the tier.
    tiles: chunks that hold the tier of every group, rounded up to few values so that few kernels are compiled.
    certain: tiles of which every group has something.
    """

    chunks: tuple[int, int, int, int]
    tiles: tuple[int, int, int, int]
    certain: tuple[int, int, int, int]

    @property
    def columns(self) -> int:
        """Coordinates that the tiles have room for."""
        return sum(chunk * tile * per for chunk, tile, per in zip(self.chunks, self.tiles, (1, 2, 4, 8), strict=True))

    def loaded_bytes(self, itemsize: int) -> int:
        """Bytes per token that the tiles take."""
        sizes = (itemsize, 2, 2, 2)
        return sum(chunk * tile * size for chunk, tile, size in zip(self.chunks, self.tiles, sizes, strict=True))

    @property
    def joined(self) -> SideShape:
        """With two tiles of 64 coordinates as one. Of groups that have but one, the other is zeros."""
        if self.chunks[0] == 64 and self.tiles[0] == 2:
            return SideShape((128, *self.chunks[1:]), (1, *self.tiles[1:]), (1, *self.certain[1:]))
        return self

    @property
    def constants(self) -> tuple[tuple[int, ...], ...]:
        """As the kernels take them."""
        return (self.chunks, self.tiles, self.certain)

    @classmethod
    def of(cls, sides: list[SideLayout], head_size: int, words: int = 16) -> SideShape:
        """`words` are the fewest of a coded tier to load at once: 16 where a product sums over them."""
        shapes = []
        for tier, width in enumerate(TIERS):
            sizes = [tier_sizes(side)[tier] for side in sides]
            most = max(sizes, default=0)
            longest = TILES[most > 192 and head_size <= 128] if width == 16 else LOADED_WORDS[most > 48]
            least = 16 if width == 16 else words
            if most > longest * _STEPS[-1]:
                raise ValueError(
                    f"a latent group with {most * 16 // width} coordinates of {width} bits on one side; the Triton "
                    f"kernels take up to {longest * _STEPS[-1] * 16 // width}: make an adapter with fewer heads per "
                    "group (--group-heads), or another budget"
                )
            chunk = max(least, min(longest, power_of_two(most)))
            if width < 16:
                smaller = [c for c in (8, 16, 32) if least <= c < chunk and most <= c * _STEPS[-1]]
                chunk = min([chunk, *smaller], key=lambda c: (c * _tiles(most, c), -c))
            # All or none: kernels that differ in more would be many.
            tiles = _tiles(most, chunk) if most else 0
            shapes.append((chunk, tiles, tiles if -(-min(sizes) // chunk) == tiles else 0) if most else (0, 0, 0))
        return cls(*zip(*shapes, strict=True))


def _tiles(most: int, chunk: int) -> int:
    """For so many numbers; rounded up to few values."""
    return next(step for step in _STEPS if step >= -(-most // chunk))


CODED_TILES = ((16, 1, 32, 224), (32, 4, 64, 640), (32, 8, 64, 1 << 30))
"""For layers with codes: least words of a tier of values that are loaded at once, warps, tokens, and columns of values
up to which these are taken. Warps share the columns, 8 words at least each, and accumulators of 16 rows of queries stay
in registers: where there are few columns, more warps would unpack what others do."""


MOST_WARP_COLUMNS = 224
"""Columns of values whose accumulators one warp has registers for."""


@dataclass(frozen=True)
class Operands:
    """What `warp` is compiled for: sides in tiles of 8 words or more, tokens at once, and stages of their loads.

    The latter two follow from times on an H200.
    """

    key: SideShape
    value: SideShape
    tokens: int
    stages: int

    @classmethod
    def of(cls, groups: Sequence[GroupLayout], head_size: int) -> Operands | None:
        """None for layers of more columns."""
        sides = [group.key for group in groups], [group.value for group in groups]
        key, value = (SideShape.of(side, head_size, 8) for side in sides)
        if value.columns > MOST_WARP_COLUMNS:
            return None
        if any(key.chunks[1:]) or any(value.chunks[1:]):
            # 8 bits take most instructions; beyond some, a loop is slower for its length.
            return cls(key, value, 32 if key.chunks[1] or value.chunks[1] else 64, 2)
        return cls(key, value, 64 if max(key.columns, value.columns) <= 64 else 32, 3)


INTEGER_ROWS = 4
"""Of queries, that `integer` is for: each has two of an operand's 8 columns."""
MOST_KEY_TILES = 5
"""Of `integer`: products with 5 * 32 words, of bytes up to 128 by 16 bits up to 32639, still sum to less than 2^31."""
MOST_INTEGERS, FEW_INTEGERS = 40, 24
"""Registers of a thread that sums of values and queries may take in `integer`, so that it is taken at all, and so that
128 in all are enough."""


@dataclass(frozen=True)
class WordShape:
    """Maxima of the words of one side over a layer's groups, which `integer` is compiled for.

    tiles: of so many words that hold all tiers' of every group.
    quarters: how many of them have codes of 2 bits.
    certain: how many every group has something of.
    exact: the 16-bit tier.
    """

    tiles: int
    quarters: int
    certain: int
    exact: SideShape

    @classmethod
    def of(cls, sides: list[SideLayout], head_size: int, words: int) -> WordShape:
        sizes = [tier_sizes(side) for side in sides]
        counts = [sum(size[1:]) for size in sizes]
        whole = SideShape.of(sides, head_size)
        exact = SideShape(*((numbers[0], 0, 0, 0) for numbers in whole.constants))
        tiles, quarters = -(-max(counts) // words), -(-max(size[3] for size in sizes) // words)
        return cls(tiles, quarters, -(-min(counts) // words), exact)

    @property
    def fields(self) -> int:
        """Of a byte of every tile, together."""
        return 2 * (self.tiles + self.quarters)

    @property
    def constants(self) -> tuple[int, int, int]:
        """As the kernels take them."""
        return (self.tiles, self.quarters, self.certain)


@dataclass(frozen=True)
class Integers:
    """What `integer` is compiled for: sides in tiles of `KEY_WORDS` and `VALUE_WORDS`, tokens at once, and stages of
    their loads. The latter two follow from times on an H200."""

    key: WordShape
    value: WordShape
    tokens: int
    stages: int

    @classmethod
    def of(cls, groups: Sequence[GroupLayout], head_size: int) -> Integers | None:
        """None for layers without codes, or of more columns than one warp has registers for."""
        key = WordShape.of([group.key for group in groups], head_size, KEY_WORDS)
        value = WordShape.of([group.value for group in groups], head_size, VALUE_WORDS)
        shape = cls(key, value, 32, 3)
        fits = key.tiles <= MOST_KEY_TILES and shape._registers <= MOST_INTEGERS
        return shape if fits and (key.tiles or value.tiles) else None

    @property
    def is_small(self) -> bool:
        return self._registers <= FEW_INTEGERS

    @property
    def _registers(self) -> int:
        sums = self.value.fields * VALUE_WORDS + 2 * self.value.exact.columns
        queries = self.key.fields * KEY_WORDS // 2 + self.key.exact.columns
        return (sums + queries) * INTEGER_ROWS // 32


@dataclass(frozen=True)
class Shapes:
    """What is compiled into a kernel for some groups; where there are codes, warps and tokens too: `CODED_TILES`.

    operands, integers: what decode takes instead where there are few rows of queries.
    """

    key: SideShape
    value: SideShape
    warps: int
    tokens: int
    operands: Operands | None
    integers: Integers | None

    @property
    def coded(self) -> bool:
        return any(self.key.chunks[1:]) or any(self.value.chunks[1:])

    @classmethod
    def of(cls, groups: Sequence[GroupLayout], head_size: int) -> Shapes:
        key = SideShape.of([group.key for group in groups], head_size)
        values = [group.value for group in groups]
        for words, warps, tokens, columns in CODED_TILES:
            value = SideShape.of(values, head_size, words)
            if value.columns <= columns:
                others = Operands.of(groups, head_size), Integers.of(groups, head_size)
                return cls(key, value, warps, tokens, *others)
        raise AssertionError("the last of CODED_TILES has room for all")


@dataclass(frozen=True)
class LayerTable:
    """Built once per layer from its bases.

    Shapes, with R the largest rank of the side in this layer; beyond a group's own rank there are zeros:
        regions:     [G, 2 * SIDE_FIELDS] int32
        key_down:    [G, Rk, n]    float32, as all bases; see `bases.RunBases`. What a product sums over is the last
                                   dimension of this, `query_up` and `value_down`
        key_shift:   [G, Rk]
        query_up:    [G, J, Rk, d]
        value_down:  [G, Rv, n]    None where C is folded into the weights
        value_shift: [G, Rv]
        value_up:    [G, J, Rv, d] None where D is folded into the weights
        value_mean:  [G, J, d]
        items:       per number of columns, [I, 6] int32: the store's work, see `_items`
        work:        per number of splits, the decode's, see `splits.work_of`
        half_shifts: [16] int32, how far either half of an operand's words is shifted, see `warp`
    """

    layout: PageLayout
    head_size: int
    group_heads: int
    shapes: Shapes
    regions: torch.Tensor
    key_down: torch.Tensor
    key_shift: torch.Tensor
    query_up: torch.Tensor
    value_down: torch.Tensor | None
    value_shift: torch.Tensor
    value_up: torch.Tensor | None
    value_mean: torch.Tensor
    items: dict[int, torch.Tensor]
    work: dict[int, torch.Tensor]
    half_shifts: torch.Tensor

    @classmethod
    def build(cls, bases: LayerBases) -> LayerTable:
        """Raises ValueError for a block size, or a tier of more coordinates, than the kernels serve."""
        layout, runs = bases.layout, bases.runs
        check_block_size(layout)
        groups, device = layout.groups, runs[0].key_down.device
        rank_k = max([16, *(group.key.rank for group in groups)])
        rank_v = max([16, *(group.value.rank for group in groups)])

        def padded(name: str, dim: int, size: int) -> torch.Tensor:
            return _by_group(runs, name, len(groups), dim, size)

        return cls(
            layout=layout,
            head_size=bases.head_size,
            group_heads=bases.group_heads,
            shapes=Shapes.of(groups, bases.head_size),
            regions=regions_of(layout, device),
            key_down=padded("key_down", -1, rank_k).mT.contiguous(),
            key_shift=padded("key_shift", -1, rank_k),
            query_up=padded("query_up", -1, rank_k).mT.contiguous(),
            value_down=None if runs[0].value_down is None else padded("value_down", -1, rank_v).mT.contiguous(),
            value_shift=padded("value_shift", -1, rank_v),
            value_up=None if runs[0].value_up is None else padded("value_up", -2, rank_v),
            value_mean=padded("value_mean", -1, runs[0].value_mean.shape[-1]),
            items={columns: _items(layout, bases.group_heads, columns).to(device) for columns in ITEM_COLUMNS},
            work=work_of(layout, device),
            half_shifts=torch.tensor([0] * 8 + [8] * 8, dtype=torch.int32, device=device),
        )

    @property
    def num_groups(self) -> int:
        return self.regions.shape[0]

    @property
    def rank_k(self) -> int:
        """Largest of the groups, 16 at least."""
        return self.key_shift.shape[-1]

    @property
    def rank_v(self) -> int:
        return self.value_shift.shape[-1]


def power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def tier_sizes(side: SideLayout) -> tuple[int, ...]:
    """Coordinates of the 16-bit tier, then words per token of the others."""
    counts = {region.width: region.size for region in side.regions}
    return tuple(counts.get(width, 0) * width // 16 for width in TIERS)


def regions_of(layout: PageLayout, device: torch.device) -> torch.Tensor:
    """[G, 2 * SIDE_FIELDS] int32."""
    rows = [_side_row(group.key, layout) + _side_row(group.value, layout) for group in layout.groups]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _side_row(side: SideLayout, layout: PageLayout) -> list[int]:
    offsets = {region.width: region.offset // (layout.itemsize if region.width == 16 else 2) for region in side.regions}
    row = [
        number for width, size in zip(TIERS, tier_sizes(side), strict=True) for number in (offsets.get(width, 0), size)
    ]
    return [*row, -1 if side.scale_offset is None else side.scale_offset // 2]


def _by_group(runs: tuple[RunBases, ...], name: str, num_groups: int, dim: int, size: int) -> torch.Tensor:
    """One tensor of the runs' bases in the order of the groups, with zeros up to `size` along `dim`."""
    shape = list(getattr(runs[0], name).shape)
    shape[0], shape[dim] = num_groups, size
    whole = getattr(runs[0], name).new_zeros(shape)
    for run in runs:
        part = getattr(run, name)
        groups = slice(None) if run.groups is None else run.groups
        whole.narrow(dim, 0, part.shape[dim])[groups] = part
    return whole


def _items(layout: PageLayout, group_heads: int, columns: int) -> torch.Tensor:
    """The store's work, [I, 6]: what is projected, group, head within it, first column, end, and share.

    `share` is the number of items whose columns are quantised together, 0 where columns are written as they are.
    """
    coded, exact, queries = [], [], []
    for group in layout.groups:
        for kind, side in ((KEY, group.key), (VALUE, group.value)):
            starts = range(side.exact, side.rank, columns)
            coded += [(kind, group.group, 0, c, min(c + columns, side.rank), len(starts)) for c in starts]
            exact += [(kind, group.group, 0, c, min(c + columns, side.exact), 0) for c in range(0, side.exact, columns)]
        for head in range(group_heads):
            queries += [
                (QUERY, group.group, head, c, min(c + columns, group.key.rank), 0)
                for c in range(0, group.key.rank, columns)
            ]
    # The last of the coded items packs what all of them projected, so they start first.
    return torch.tensor([*coded, *exact, *queries], dtype=torch.int32).reshape(-1, 6)
