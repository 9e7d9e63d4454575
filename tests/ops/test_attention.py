# SPDX-License-Identifier: Apache-2.0
"""Store and attend against the formulae written out, on caches that are full of NaN."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mkv_kernels.attend import attend
from mkv_kernels.bases import LayerBases
from mkv_kernels.codes import multipliers, round_trip
from mkv_kernels.layout import PageLayout, side_bytes
from mkv_kernels.pages import view_pages
from mkv_kernels.schedule import make_buckets
from mkv_kernels.store import project_and_store

LENGTHS = (1, 15, 16, 17, 63, 100)
SCALE = 0.2


def blocks(rank: int, n: int) -> tuple[int, ...]:
    return tuple(16 if 16 * i < rank else 0 for i in range(n // 16))


class Layer:
    """A layer of random, well-conditioned dual bases and everything to run it with."""

    def __init__(
        self,
        *,
        d=32,
        J=2,
        ranks=((64, 64), (16, 48), (32, 0)),
        widths=None,
        M=2,
        block_size=16,
        dtype=torch.float64,
        fold_down=False,
        fold_up=False,
        window=0,
        soft_cap=0.0,
    ) -> None:
        torch.manual_seed(0)
        self.window, self.soft_cap = window, soft_cap
        self.d, self.J, self.M, self.block_size, self.dtype = d, J, M, block_size, dtype
        self.n = d * J
        self.widths = widths or tuple((blocks(k, self.n), blocks(v, self.n)) for k, v in ranks)
        self.G = len(self.widths)
        eye = torch.eye(self.n, dtype=torch.float64)
        self.A = eye + torch.randn(self.G, self.n, self.n, dtype=torch.float64) / (4 * self.n**0.5)
        self.C = eye + torch.randn(self.G, self.n, self.n, dtype=torch.float64) / (4 * self.n**0.5)
        self.B, self.D = torch.linalg.inv(self.A).mT.contiguous(), torch.linalg.inv(self.C)
        self.key_mean, self.value_mean = torch.randn(2, self.G, self.n, dtype=torch.float64)
        self.layout = PageLayout(self.widths, block_size, dtype.itemsize)
        self.bases = LayerBases.cut(
            self.layout,
            A=self.A,
            B=self.B,
            C=self.C,
            D=self.D,
            key_mean=self.key_mean,
            value_mean=self.value_mean,
            head_size=d,
            fold_down=fold_down,
            fold_up=fold_up,
        )
        # A block stride beyond the page, as where layers are interleaved.
        elements = self.layout.page_bytes // dtype.itemsize
        self.memory = torch.full((64, elements + 24), float("nan"), dtype=dtype)
        self.cache = self.memory[:, :elements].view(64, 1, block_size, -1)
        self.pages = view_pages(self.cache, self.layout)

    def inputs(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        heads = (self.G * self.J * self.M, self.G * self.J, self.G * self.J)
        return tuple(torch.randn(num_tokens, h, self.d, dtype=torch.float64).to(self.dtype) for h in heads)

    def expected(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of one whole request, in float64."""
        T = q.shape[0]
        out = torch.empty(T, self.G, self.J, self.M, self.d, dtype=torch.float64)
        hidden = torch.ones(T, T).triu(1).bool()
        if self.window:
            hidden |= torch.ones(T, T).tril(-self.window).bool()
        for g, (widths_k, widths_v) in enumerate(self.widths):
            down = (k.double().view(T, self.G, -1)[:, g] - self.key_mean[g]) @ self.A[g]
            k_hat = round_trip(down, widths_k) @ self.B[g].T
            down = (v.double().view(T, self.G, -1)[:, g] - self.value_mean[g]) @ self.C[g]
            v_hat = round_trip(down, widths_v) @ self.D[g] + self.value_mean[g]
            for j, m in itertools.product(range(self.J), range(self.M)):
                head = slice(j * self.d, (j + 1) * self.d)
                scores = q.double().view(T, self.G, self.J, self.M, -1)[:, g, j, m] @ k_hat[:, head].T * SCALE
                if self.soft_cap:
                    scores = self.soft_cap * (scores / self.soft_cap).tanh()
                out[:, g, j, m] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_hat[:, head]
        return out.view(T, -1, self.d)


def run_in_chunks(layer: Layer, requests, seed: int, fold_C=None) -> list[torch.Tensor]:
    """Feeds whole requests in random chunks, in mixed batches, through shuffled blocks.

    What lies before all windows to come becomes NaN.
    """
    rng = random.Random(seed)
    bs = layer.block_size
    free = list(range(1, 64))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-len(q) // bs))] for q, _, _ in requests]
    width = max(map(len, tables))
    block_table = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
    done, outputs = [0] * len(requests), [[] for _ in requests]
    while any(a < len(q) for a, (q, _, _) in zip(done, requests, strict=True)):
        chunk = [min(rng.choice([1, 1, 7, 20, 64]), len(q) - a) for a, (q, _, _) in zip(done, requests, strict=True)]
        active = [i for i, count in enumerate(chunk) if count]
        q, k, v = (torch.cat([requests[i][x][done[i] : done[i] + chunk[i]] for i in active]) for x in range(3))
        slots = torch.tensor(
            [tables[i][p // bs] * bs + p % bs for i in active for p in range(done[i], done[i] + chunk[i])]
        )
        projected = project_and_store(q, k, v, layer.pages, layer.bases, slots, None)
        starts = torch.tensor([0, *itertools.accumulate(chunk[i] for i in active)])
        lens = torch.tensor([done[i] + chunk[i] for i in active])
        scores = rng.choice([1 << 24, 300])
        table = block_table[active]
        buckets = make_buckets(starts, lens, table, bs, layer.dtype, max_scores=scores, window=layer.window)
        output = torch.full_like(q, float("nan"))
        attend(projected, layer.pages, layer.bases, buckets, SCALE, output, layer.soft_cap)
        for i, out in zip(active, output.split([chunk[i] for i in active]), strict=True):
            outputs[i].append(out)
            done[i] += chunk[i]
            if layer.window:
                layer.memory[tables[i][: max(0, done[i] - layer.window + 1) // bs]] = float("nan")
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"J": 1, "d": 64, "M": 1, "ranks": ((64, 64), (16, 64), (48, 16), (16, 64))},
        {"J": 4, "d": 16, "M": 4, "ranks": ((16, 16),) * 3, "block_size": 8},
        {"J": 1, "d": 96, "M": 7, "ranks": ((96, 48),), "block_size": 128},
        {"J": 1, "d": 256, "M": 1, "ranks": ((16, 256), (256, 16)), "block_size": 32},
    ],
    ids=["uneven", "per-head", "equal", "one-group", "head-256"],
)
def test_any_mix_of_chunks_equals_the_formula(shape, seed):
    layer = Layer(**shape)
    requests = [layer.inputs(length) for length in LENGTHS]
    for found, request in zip(run_in_chunks(layer, requests, seed), requests, strict=True):
        # Projections are float32 by contract, so 64 bits elsewhere leave its rounding alone.
        torch.testing.assert_close(found.double(), layer.expected(*request), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("J", [1, 2])
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(1, 0.0), (5, 0.5), (16, 0.0), (64, 0.5), (70, 0.0), (100, 0.0), (1000, 0.0), (0, 0.5)]
)
def test_windows_and_soft_caps_in_any_mix_of_chunks(window, soft_cap, J):
    ranks = ((32 * J, 16), (16, 32 * J))
    layer = Layer(J=J, ranks=ranks, window=window, soft_cap=soft_cap, block_size=8)
    requests = [layer.inputs(length) for length in LENGTHS]
    for seed in range(3):
        for found, request in zip(run_in_chunks(layer, requests, seed), requests, strict=True):
            torch.testing.assert_close(found.double(), layer.expected(*request), atol=2e-5, rtol=2e-5)


def test_buckets_hold_no_more_than_windows():
    block_table = torch.arange(1000, dtype=torch.int32)[None]
    for chunk, window, pages in ((1, 100, 7), (1, 113, 8), (4096, 512, 64)):
        starts, lens = torch.tensor([0, chunk]), torch.tensor([16000])
        buckets = make_buckets(starts, lens, block_table, 16, torch.float32, window=window)
        assert max(bucket.blocks.shape[1] for bucket in buckets) == pages
        assert sum(len(bucket.tokens) for bucket in buckets) == chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_more_than_twice_that_of_plain_attention(dtype):
    layer = Layer(dtype=dtype, ranks=((64, 64), (64, 64)))
    request = layer.inputs(100)
    expected = layer.expected(*request)
    q, k, v = (x.transpose(0, 1)[None] for x in request)
    heads = q.shape[1] // k.shape[1]
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1), is_causal=True, scale=SCALE
    )[0].transpose(0, 1)
    found = run_in_chunks(layer, [request], 0)[0]
    floor = torch.finfo(dtype).eps
    assert (found - expected).abs().mean() <= 2 * (plain - expected).abs().mean() + floor


@pytest.mark.parametrize(("J", "fold_up"), [(1, False), (1, True), (2, False)])
def test_folded_values_give_the_same_attention(J, fold_up):
    shape = {"J": J, "d": 32, "ranks": ((32 * J, 16), (16, 32 * J))}
    plain, folded = Layer(**shape), Layer(**shape, fold_down=True, fold_up=fold_up)
    requests = [plain.inputs(length) for length in LENGTHS]
    times_C = [(q, k, (v.view(len(v), plain.G, 1, -1) @ plain.C).view_as(v)) for q, k, v in requests]
    for found, request in zip(run_in_chunks(folded, times_C, 0), requests, strict=True):
        if fold_up:
            by_group = found.view(len(found), plain.G, -1, plain.d)
            found = torch.einsum("tgme,gef->tgmf", by_group, plain.D).reshape(found.shape)
        torch.testing.assert_close(found, plain.expected(*request), atol=2e-5, rtol=2e-5)


TIERED = (
    ((16, 8, 4, 2), (8, 8, 4, 0)),
    ((4, 2, 0, 0), (16, 16, 16, 16)),
    ((16, 16, 16, 16), (2, 2, 2, 2)),
    ((8, 0, 0, 0), (0, 0, 0, 0)),
)
TIERED_SHAPES = {
    "all-widths": {"widths": TIERED},
    "one-width-each": {"widths": tuple(((w,) * 4, (w,) * 4) for w in (16, 8, 4, 2))},
    "equal": {"widths": (((8, 4, 4, 2), (4, 4, 2, 2)),) * 3, "block_size": 8},
    "one-head": {"widths": (((4, 4, 2, 2), (4, 2, 2, 0)),) * 2, "J": 1, "d": 64, "M": 7, "block_size": 32},
    "float32": {"widths": TIERED, "dtype": torch.float32},
}


def assert_close_but_for_flips(found, expected):
    """Rounding may take a coordinate, or a scale, to its neighbour now and then; more than that is wrong."""
    error = (found.double() - expected).abs()
    assert error.mean() < 2e-4 and error.max() < 0.1, (error.mean(), error.max())


@pytest.mark.parametrize("shape", TIERED_SHAPES.values(), ids=TIERED_SHAPES)
def test_tiers_in_any_mix_of_chunks_equal_the_formula(shape):
    layer = Layer(**shape)
    requests = [layer.inputs(length) for length in LENGTHS]
    coarse = Layer(**shape)
    coarse.widths = tuple(tuple(tuple(0 for _ in side) for side in group) for group in layer.widths)
    for found, request in zip(run_in_chunks(layer, requests, 0), requests, strict=True):
        assert_close_but_for_flips(found, layer.expected(*request))
        assert len(found) < 10 or (coarse.expected(*request) - found).abs().mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiers_in_half_precision(dtype):
    layer = Layer(widths=TIERED, dtype=dtype)
    request = layer.inputs(100)
    error = (run_in_chunks(layer, [request], 0)[0].double() - layer.expected(*request)).abs()
    assert error.mean() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("J", [1, 2])
def test_folded_values_give_the_same_attention_with_tiers(J):
    widths = (((8, 4) * J, (16, 4) + (2, 0) * (J - 1)), ((4, 2) + (2, 2) * (J - 1), (4, 2) + (2, 2) * (J - 1)))
    shape = {"J": J, "d": 32, "widths": tuple((tuple(sorted(k, reverse=True)), v) for k, v in widths)}
    fold_up = J == 1
    plain, folded = Layer(**shape), Layer(**shape, fold_down=True, fold_up=fold_up)
    requests = [plain.inputs(length) for length in LENGTHS]
    times_C = [(q, k, (v.view(len(v), plain.G, 1, -1) @ plain.C).view_as(v)) for q, k, v in requests]
    for found, request in zip(run_in_chunks(folded, times_C, 0), requests, strict=True):
        if fold_up:
            D = torch.stack([multipliers(v)[:, None] * D for (_, v), D in zip(plain.widths, plain.D, strict=True)])
            by_group = found.view(len(found), plain.G, -1, plain.d)
            found = torch.einsum("tgme,gef->tgmf", by_group, D).reshape(found.shape)
        assert_close_but_for_flips(found, plain.expected(*request))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outliers_and_empty_tokens_stay_finite(dtype):
    """A key a hundred times the others, one that is all zero, and one at the mean itself."""
    layer = Layer(widths=TIERED, dtype=dtype)
    q, k, v = layer.inputs(40)
    for x, mean in ((k, layer.key_mean), (v, layer.value_mean)):
        x[3] *= 100
        x[7] = 0
        x[11] = mean.reshape(x[11].shape).to(dtype)
    found = run_in_chunks(layer, [(q, k, v)], 0)[0]
    assert found.isfinite().all()
    if dtype == torch.float32:
        assert_close_but_for_flips(found / 100, layer.expected(q, k, v) / 100)


@pytest.mark.parametrize("widths", [None, TIERED], ids=["ranks", "tiers"])
def test_exactly_the_bytes_of_stored_tokens_are_written(widths):
    slots, tokens = torch.tensor([37, 5 * 16 + 3]), torch.tensor([0, 2])
    written = 0
    for fill in (0x00, 0xFF):  # a byte that is written equals one of them at most
        layer = Layer(widths=widths, dtype=torch.float32)
        memory = layer.memory.view(torch.uint8)
        memory.fill_(fill)
        project_and_store(*layer.inputs(4), layer.pages, layer.bases, slots, tokens)
        written = written | (memory != fill)
    assert written.any(1).nonzero()[:, 0].tolist() == [2, 5]
    per_token = sum(side_bytes(side, 4) for group in layer.widths for side in group)
    assert written.sum(1)[[2, 5]].tolist() == [per_token, per_token]
    assert 0 <= layer.layout.bytes_per_token - per_token < 4, "whole numbers of the model's dtype"


def test_caches_of_another_shape_are_refused():
    layer = Layer()
    with pytest.raises(ValueError, match="its pages should be"):
        view_pages(layer.cache[..., :-1], layer.layout)
    with pytest.raises(ValueError, match="not dense"):
        view_pages(torch.empty(4, 1, layer.cache.shape[3], 16, dtype=layer.dtype).transpose(2, 3), layer.layout)
