# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, the Triton kernels of this folder's tests run in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from interpreter import hasten

from mkv_kernels.attend import attend
from mkv_kernels.bases import LayerBases
from mkv_kernels.codes import multipliers
from mkv_kernels.layout import GroupWidths, PageLayout
from mkv_kernels.pages import view_pages
from mkv_kernels.schedule import make_buckets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_BLOCKS = 80
SCALE = 0.2


def import_interpreted() -> None:
    """Imports the kernels so that Triton interprets them.

    Triton decides when a kernel, or its own library, is decorated. So the variable is set for the import alone, where
    no engine that a later test starts inherits it, and Triton is imported anew if another test module already did.
    """
    for name in [name for name in sys.modules if f"{name}.".startswith("triton.") and "triton._C" not in name]:
        del sys.modules[name]
    assert not any(name.startswith("mkv_kernels.fused.") for name in sys.modules), "kernels were imported before"
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # A launch would import this later, and expects to find it interpreted.
        import triton.experimental.gluon  # noqa: F401

        import mkv_kernels.fused.decode
        import mkv_kernels.fused.expand
        import mkv_kernels.fused.prefill
        import mkv_kernels.fused.store  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    hasten()


ARCH = os.environ.get("MKV_RUN_PTX", "")
"""Where set, kernels are compiled for it and their PTX is run, which takes a while; see `compiled_for_gpu`."""
if ARCH:
    import compiled_for_gpu

    compiled_for_gpu.install(ARCH)
elif DEVICE == "cpu":
    import_interpreted()


def block_widths(width: int, *groups: tuple[str, str]) -> tuple[GroupWidths, ...]:
    """Widths of groups of `width` coordinates: `"16x2 4x3"` has two blocks of 16 bits, then three of 4, then none."""

    def side(runs: str) -> tuple[int, ...]:
        counts = [(int(bits), int(count)) for bits, _, count in (run.partition("x") for run in runs.split())]
        stored = [bits for bits, count in counts for _ in range(count)]
        return (*stored, *[0] * (width // 16 - len(stored)))

    return tuple((side(key), side(value)) for key, value in groups)


@dataclass
class Step:
    """A step of several requests, as a launcher takes it.

    Shapes: query q' [T, G, J, M, R], with NaN beyond each group's rank; the rest as in `decode`.
    """

    query: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @property
    def integers(self) -> tuple[torch.Tensor, ...]:
        return self.block_table, self.seq_lens, self.query_start_loc


class FusedLayer:
    """A layer of random bases, and a cache full of NaN whose blocks lie further apart than their pages are long."""

    def __init__(
        self,
        *groups: tuple[str, str],
        widths: Sequence[GroupWidths] | None = None,
        J: int = 1,
        M: int = 4,
        d: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        fold_down: bool = False,
        fold_up: bool = False,
        window: int = 0,
        soft_cap: float = 0.0,
        seed: int = 0,
    ) -> None:
        from mkv_kernels.fused.table import LayerTable

        torch.manual_seed(seed)
        widths = widths or block_widths(J * d, *groups)
        self.J, self.M, self.d, self.dtype, self.G, n = J, M, d, dtype, len(widths), J * d
        self.window, self.soft_cap = window, soft_cap
        A, C = torch.eye(n) + torch.randn(2, self.G, n, n) / (4 * n**0.5)
        self.layout = PageLayout(tuple(widths), block_size, dtype.itemsize)
        self.bases = LayerBases.cut(
            self.layout,
            A=A,
            B=torch.linalg.inv(A).mT,
            C=C,
            D=torch.linalg.inv(C),
            key_mean=torch.randn(self.G, n),
            value_mean=torch.randn(self.G, n),
            head_size=d,
            fold_down=fold_down,
            fold_up=fold_up,
            device=DEVICE,
        )
        self.table = LayerTable.build(self.bases)
        elements = self.layout.page_bytes // dtype.itemsize
        self.memory = torch.empty(NUM_BLOCKS, elements + 16, dtype=dtype, device=DEVICE)
        self.poison()

    def poison(self, byte: int = 0xFF) -> None:
        """All ones are NaN in every dtype, the scales' float16 too."""
        self.memory.view(torch.uint8).fill_(byte)

    @property
    def cache(self) -> torch.Tensor:
        elements = self.layout.page_bytes // self.dtype.itemsize
        return self.memory[:, :elements].view(NUM_BLOCKS, 1, self.layout.block_size, -1)

    @property
    def num_heads(self) -> int:
        return self.G * self.J * self.M

    def step(self, seq_lens: Sequence[int], queries: Sequence[int], padding: int = 0) -> Step:
        """Fills pages in a random order, with random coordinates; `padding` requests are empty."""
        block_size, pages = self.layout.block_size, view_pages(self.cache, self.layout)
        free = torch.randperm(NUM_BLOCKS).tolist()
        width = max(-(-length // block_size) for length in seq_lens) + 1
        poisoned = free.pop()
        table = torch.full((len(seq_lens) + padding, width), poisoned, dtype=torch.int32)
        for request, length in enumerate(seq_lens):
            own = [free.pop() for _ in range(-(-length // block_size))]
            table[request, : len(own)] = torch.tensor(own)
            place = torch.arange(length)
            block = torch.tensor(own)[place // block_size].to(DEVICE)
            for page in pages:
                for side in (page.key, page.value):
                    x = torch.randn(length, side.exact.shape[1], side.layout.rank, device=DEVICE)
                    # Tokens differ in size, as scales should show.
                    x *= torch.rand(length, 1, 1, device=DEVICE) + 0.5
                    side.write(block, (place % block_size).to(DEVICE), x)
        T, R = sum(queries), self.table.rank_k
        query = torch.full((T, self.G, self.J, self.M, R + 16), float("nan"), dtype=self.dtype, device=DEVICE)
        for group in self.layout.groups:
            x = torch.randn(T, self.J, self.M, group.key.rank) / (group.key.rank or 1) ** 0.5
            x *= 4 * multipliers(group.key.widths)[: group.key.rank]
            query[:, group.group, ..., : group.key.rank] = x.to(DEVICE, self.dtype)
        starts = torch.tensor([0, *queries, *[0] * padding]).cumsum(0)
        lens = torch.tensor([*seq_lens, *[0] * padding])
        return Step(query, *(x.to(DEVICE, torch.int32) for x in (table, lens, starts)))

    def decode(
        self,
        step: Step,
        *,
        max_queries: int = 1,
        num_splits: int = 1,
        reserved: int | None = None,
        poison: float = float("nan"),
    ) -> torch.Tensor:
        """By the kernel; whatever it does not write is NaN. `reserved` splits have a workspace, by default all; its
        numbers are `poison` before."""
        from mkv_kernels.fused.decode import DecodeWorkspace, decode

        T = len(step.query)
        workspace = DecodeWorkspace.make(self.table, T, self.num_heads, reserved or num_splits)
        workspace.partial.fill_(poison)
        workspace.stats.fill_(poison)
        output = torch.full((T, self.num_heads, self.d), float("nan"), dtype=self.dtype, device=DEVICE)
        decode(
            step.query,
            self.cache,
            self.table,
            *step.integers,
            SCALE,
            output,
            workspace,
            max_queries=max_queries,
            num_splits=num_splits,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return output

    def by_run(self, query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q' as the twin takes it."""
        return tuple(query[:, list(run.run.groups), ..., : run.rank_k] for run in self.bases.runs)

    def twin(self, step: Step) -> torch.Tensor:
        output = torch.full((len(step.query), self.num_heads, self.d), float("nan"), dtype=self.dtype, device=DEVICE)
        filled = int((step.seq_lens > 0).sum())
        buckets = make_buckets(
            step.query_start_loc[: filled + 1].cpu(),
            step.seq_lens[:filled].cpu(),
            step.block_table[:filled],
            self.layout.block_size,
            self.dtype,
            window=self.window,
        )
        pages = view_pages(self.cache, self.layout)
        attend(self.by_run(step.query), pages, self.bases, buckets, SCALE, output, self.soft_cap)
        return output

    def poison_before_windows(self, step: Step) -> int:
        """Fills pages that no query of their request sees anything of with NaN; returns how many there were."""
        block_size, poisoned = self.layout.block_size, 0
        counts, lengths = step.query_start_loc.diff().tolist(), step.seq_lens.tolist()
        for blocks, count, length in zip(step.block_table, counts, lengths, strict=True):
            before = max(0, length - count - self.window + 1) // block_size
            self.memory.view(torch.uint8)[blocks[:before].long()] = 0xFF
            poisoned += before
        return poisoned

    def expected(self, step: Step) -> torch.Tensor:
        """In float64, of the coordinates that the pages hold."""
        output = torch.empty(len(step.query), self.G, self.J, self.M, self.d, dtype=torch.float64, device=DEVICE)
        starts, pages = step.query_start_loc.tolist(), view_pages(self.cache, self.layout)
        for request, length in enumerate(step.seq_lens.tolist()):
            own = slice(starts[request], starts[request + 1])
            count = own.stop - own.start
            table = step.block_table[request : request + 1, : -(-length // self.layout.block_size)].long()
            hidden = torch.ones(count, length, device=DEVICE).triu(length - count + 1).bool()
            if self.window:
                hidden |= torch.ones_like(hidden).tril(length - count - self.window)
            for q, page, run in zip(self.by_run(step.query[own]), pages, self.bases.runs, strict=True):
                k, v = (side.read(table, length, torch.float64)[:, 0] for side in (page.key, page.value))
                s = torch.einsum("tgjmr,glr->gjmtl", q.double(), k) * SCALE
                if self.soft_cap:
                    s = self.soft_cap * (s / self.soft_cap).tanh()
                p = s.masked_fill(hidden, -torch.inf).softmax(-1)
                o = torch.einsum("gjmtl,glr->tgjmr", p, v)
                if run.value_up is None:
                    o = torch.nn.functional.pad(o, (0, self.d - o.shape[-1]))
                else:
                    o = torch.einsum("tgjmr,gjrd->tgjmd", o, run.value_up.double())
                output[own, list(run.run.groups)] = o + run.value_mean[:, :, None].double()
        return output.view(len(step.query), self.num_heads, self.d)

    def check(self, found: torch.Tensor, step: Step, exact: Step | None = None) -> None:
        """Raises unless the error is at most twice that of the twin in the same dtype, and a rounding.

        `exact` has q' that were not rounded, where what was found did not come from rounded ones.
        """
        expected = self.expected(exact or step)
        plain = (self.twin(step).double() - expected).abs()
        error = (found.double() - expected).abs()
        floor = torch.finfo(self.dtype).eps * expected.abs()
        assert error.mean() <= 2 * plain.mean() + floor.mean(), (error.mean(), plain.mean())
        assert error.max() <= 2 * plain.max() + 4 * floor.max(), (error.max(), plain.max())


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., FusedLayer]:
    """`make_layer(("16x2 4x3", "8x4"), **shape)`: a `FusedLayer` of one group, see `block_widths`."""
    return FusedLayer
