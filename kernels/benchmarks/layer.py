# SPDX-License-Identifier: Apache-2.0
"""A layer of random bases at some budget, its cache full of random codes, and a step of requests of one length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.cases import Geometry, Spec, draw_widths
from mkv_kernels.bases import LayerBases
from mkv_kernels.codes import multipliers, scale_codes
from mkv_kernels.fused.table import LayerTable
from mkv_kernels.layout import PageLayout
from mkv_kernels.pages import view_pages


@dataclass(frozen=True)
class Shape:
    """Requests of one length: `queries` of the last of `context` tokens attend, in each of `batch` requests."""

    batch: int
    context: int
    queries: int = 1

    @property
    def num_tokens(self) -> int:
        return self.batch * self.queries

    def num_blocks(self, block_size: int) -> int:
        return self.batch * -(-self.context // block_size)


@dataclass(frozen=True)
class Setting:
    """What all shapes and layers of a run have in common."""

    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    block_size: int = 16
    folded: bool = True
    """C is folded into the model's weights; D, too, where a group has one head."""
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.geometry.head_size**-0.5

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class Requests:
    """As launchers take them: block_table [B, blocks], seq_lens [B], query_start_loc [B + 1], all int32."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, setting: Setting) -> Requests:
        """Pages in a random order, as a server that has run for a while has them."""
        device, integers = setting.device, torch.int32
        pages = torch.randperm(
            shape.num_blocks(setting.block_size), generator=setting.generator(), device=device, dtype=torch.int64
        )
        starts = torch.arange(0, shape.num_tokens + 1, shape.queries, device=device)
        return cls(
            pages.view(shape.batch, -1).to(integers),
            torch.full((shape.batch,), shape.context, device=device, dtype=integers),
            starts.to(integers),
        )


@dataclass(frozen=True)
class Queries:
    """Shapes: own [T, H, 1, M, d], projected q' [T, G, J, M, R], and that in float32."""

    own: torch.Tensor
    projected: torch.Tensor
    exact: torch.Tensor


class Layer:
    def __init__(self, setting: Setting, spec: Spec) -> None:
        geometry, J = setting.geometry, spec.group_heads
        self.setting, self.spec = setting, spec
        self.widths = draw_widths(geometry, spec, setting.dtype.itemsize, setting.seed)
        self.layout = PageLayout(self.widths, setting.block_size, setting.dtype.itemsize)
        self.num_groups, self.group_heads = len(self.widths), J
        self.query_heads = geometry.query_heads // geometry.kv_heads
        n = J * geometry.head_size
        generator = torch.Generator().manual_seed(setting.seed)
        A, C = torch.linalg.qr(torch.randn(2, self.num_groups, n, n, generator=generator))[0]
        mean = 0.1 * torch.randn(2, self.num_groups, n, generator=generator)
        self.bases = LayerBases.cut(
            self.layout,
            A=A,
            B=A,
            C=C,
            D=C.mT,
            key_mean=mean[0],
            value_mean=mean[1],
            head_size=geometry.head_size,
            fold_down=setting.folded,
            fold_up=setting.folded and J == 1,
            device=setting.device,
        )

    @cached_property
    def table(self) -> LayerTable:
        return LayerTable.build(self.bases)

    @property
    def num_heads(self) -> int:
        return self.setting.geometry.query_heads

    def new_cache(self, num_blocks: int) -> torch.Tensor:
        """All ones, which are NaN in every dtype."""
        layout, setting = self.layout, self.setting
        shape = (num_blocks, 1, layout.block_size, layout.bytes_per_token)
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=setting.device).view(setting.dtype)

    def filled_cache(self, num_blocks: int) -> torch.Tensor:
        cache, generator = self.new_cache(num_blocks), self.setting.generator()
        # Tokens differ in size, as scales should show.
        low, high = scale_codes(torch.tensor([[0.5], [1.5]])).tolist()
        for run in view_pages(cache, self.layout):
            for side in (run.key, run.value):
                if side.exact.shape[-1]:
                    side.exact.normal_(generator=generator)
                for tier in side.coded:
                    tier.random_(-(1 << 15), 1 << 15, generator=generator)
                if side.scales is not None:
                    side.scales.random_(low, high + 1, generator=generator)
        return cache

    def new_queries(self, num_tokens: int) -> torch.Tensor:
        """q' [T, G, J, M, R] such that scores have a deviation of a few; 0 beyond a group's rank."""
        setting, R = self.setting, self.table.rank_k
        size = torch.zeros(self.num_groups, 1, 1, R)
        for group in self.layout.groups:
            rank = group.key.rank
            size[group.group, ..., :rank] = (
                multipliers(group.key.widths)[:rank] * (setting.geometry.head_size / rank) ** 0.5
            )
        shape = (num_tokens, self.num_groups, self.group_heads, self.query_heads, R)
        query = torch.empty(shape, dtype=setting.dtype, device=setting.device).normal_(generator=setting.generator())
        return query.mul_(size.to(setting.device, setting.dtype))

    def model_queries(self, num_tokens: int) -> Queries:
        """A model's own, and what the store makes of them."""
        setting, geometry = self.setting, self.setting.geometry
        shape = (num_tokens, geometry.kv_heads, 1, self.query_heads, geometry.head_size)
        own = torch.empty(shape, dtype=setting.dtype, device=setting.device).normal_(generator=setting.generator())
        grouped = own.view(num_tokens, self.num_groups, self.group_heads, *shape[3:])
        exact = torch.einsum("tgjmd,gjrd->tgjmr", grouped.float(), self.table.query_up)
        return Queries(own, exact.to(setting.dtype), exact)

    def new_output(self, num_tokens: int) -> torch.Tensor:
        shape = (num_tokens, self.num_heads, self.setting.geometry.head_size)
        return torch.full(shape, float("nan"), dtype=self.setting.dtype, device=self.setting.device)

    def new_inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as columns of one projection, and the slots, in a random order."""
        geometry, setting, generator = self.setting.geometry, self.setting, self.setting.generator()
        heads = (geometry.query_heads, geometry.kv_heads, geometry.kv_heads)
        qkv = torch.empty(num_tokens, sum(heads), geometry.head_size, dtype=setting.dtype, device=setting.device)
        q, k, v = qkv.normal_(generator=generator).split(heads, 1)
        num_slots = -(-num_tokens // setting.block_size) * setting.block_size
        slots = torch.randperm(num_slots, generator=generator, device=setting.device)[:num_tokens]
        return q, k, v, slots

    def by_run(self, query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q' as the twin takes it."""
        return tuple(
            query[..., : run.rank_k] if run.groups is None else query[:, run.groups, ..., : run.rank_k]
            for run in self.bases.runs
        )
