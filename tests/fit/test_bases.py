# SPDX-License-Identifier: Apache-2.0
"""Bases are dual, nested and optimal, on synthetic statistics."""

import numpy as np
import pytest
import torch
from torch import nn

from vllm_mkv.fit.bases import BASES, block_diagonal, dual_pair, output_metric
from vllm_mkv.fit.statistics import LayerStatistics, Moments

HEADS, QUERIES, D, TOKENS = 4, 2, 16, 400


def random_layer(seed=0, d=D, heads=HEADS):
    """q [1, H, T, d], k and v [1, Hkv, T, d] with very uneven and correlated coordinates, and keys far from 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, spread):
        mix = torch.randn(count, d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -spread, d)
        common = torch.randn(1, 1, TOKENS, d, generator=generator, dtype=torch.float64)
        own = torch.randn(1, count, TOKENS, d, generator=generator, dtype=torch.float64)
        return (own + common) @ mix.mT

    return draw(heads * QUERIES, 1), draw(heads, 1.5) + 3, draw(heads, 1.5) - 1


def statistics_of(group_heads, seed=0, **shape):
    q, k, v = random_layer(seed, **shape)
    statistics = LayerStatistics(group_heads)
    statistics.add(q, k, v)
    return statistics, (q, k, v)


def random_metric(d=D, heads=HEADS):
    W = torch.randn(heads, d, 3 * d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return W @ W.mT


@pytest.mark.parametrize("group_heads", [1, 2, HEADS])
@pytest.mark.parametrize("basis", BASES)
def test_pairs_are_inverse_in_float32(basis, group_heads):
    statistics, _ = statistics_of(group_heads)
    bases = BASES[basis](statistics, random_metric())
    identity = np.eye(group_heads * D, dtype=np.float32)
    for down, up in ((bases.A, bases.B.swapaxes(-1, -2)), (bases.C, bases.D)):
        assert down.dtype == up.dtype == np.float32
        assert down.shape == (HEADS // group_heads, group_heads * D, group_heads * D)
        assert np.abs(down @ up - identity).max() <= 1e-4


@pytest.mark.parametrize("metric_scale, covariance_scale", [(1e-12, 1e8), (1e6, 1e-6), (1, 0), (0, 1)])
def test_pairs_are_inverse_however_badly_conditioned(metric_scale, covariance_scale):
    spectrum = torch.logspace(0, -14, 32, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    matrix = Q * spectrum @ Q.mT
    A, B = dual_pair(metric_scale * matrix, covariance_scale * matrix.flip(0))
    assert np.isfinite(A).all() and np.isfinite(B).all()
    assert np.abs(A @ B.swapaxes(-1, -2) - np.eye(32, dtype=np.float32)).max() <= 1e-4


def score_error(q, k, A, B, mean, group_heads, rank):
    """E[(q.(k - mean) - q'.k')^2] over all pairs of a query and a key, directly, summed over query heads."""
    total = 0.0
    d = q.shape[-1]
    for head in range(q.shape[1]):
        kv = head // QUERIES
        group, inside = divmod(kv, group_heads)
        keys = torch.cat([k[0, group * group_heads + j] for j in range(group_heads)], -1) - mean[group]
        rows = B[group][inside * d : (inside + 1) * d, :rank]
        error = (
            q[0, head] @ keys[:, inside * d : (inside + 1) * d].T - (q[0, head] @ rows) @ (keys @ A[group][:, :rank]).T
        )
        total += float((error**2).mean())
    return total


def doubles(*arrays):
    return [torch.from_numpy(array).double() for array in arrays]


@pytest.mark.parametrize("group_heads", [1, 2, HEADS])
def test_query_basis_has_the_least_error_of_scores(group_heads):
    statistics, (q, k, _) = statistics_of(group_heads)
    n = group_heads * D
    generator = torch.Generator().manual_seed(5)
    found = {}
    for basis in BASES:
        bases = BASES[basis](statistics, random_metric())
        A, B, mean = doubles(bases.A, bases.B, bases.key_mean)
        found[basis] = [score_error(q, k, A, B, mean, group_heads, rank) for rank in range(0, n + 1, n // 4)]
        if basis == "query":
            best = A, B, mean
    assert found["query"] == sorted(found["query"], reverse=True)
    for mine, pca in zip(found["query"][1:-1], found["pca"][1:-1], strict=True):
        assert mine < 0.9 * pca
    A, B, mean = best
    for trial in range(5):
        # A random pair, and a small change of the best one.
        for random in (torch.eye(n) * 0, torch.eye(n)):
            change = random.double() + (0.01 if random.any() else 1.0) * torch.randn(
                len(A), n, n, generator=generator, dtype=torch.float64
            )
            other = A @ change, B @ torch.linalg.inv(change).mT
            assert score_error(q, k, *other, mean, group_heads, n // 2) > found["query"][2], trial


def test_error_of_scores_is_the_sum_of_the_dropped_singular_values():
    statistics, (q, k, _) = statistics_of(1)
    bases = BASES["query"](statistics, random_metric())
    A, B, mean = doubles(bases.A, bases.B, bases.key_mean)
    # In the dual basis queries and keys have the same diagonal second moments: the singular values.
    second = A.mT @ statistics.key.covariance @ A
    queries = B.mT @ statistics.query_second @ B
    sigma = second.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(second, torch.diag_embed(sigma), atol=1e-4 * float(sigma.max()), rtol=0)
    torch.testing.assert_close(queries, torch.diag_embed(sigma), atol=1e-4 * float(sigma.max()), rtol=0)
    assert (sigma.diff() <= 1e-6 * sigma.max()).all()
    dropped = float((sigma[:, 8:] ** 2).sum())
    assert score_error(q, k, A, B, mean, 1, 8) == pytest.approx(dropped, rel=1e-3)


@pytest.mark.parametrize("group_heads", [1, 2, HEADS])
def test_query_basis_has_the_least_error_after_the_output_projection(group_heads):
    statistics, _ = statistics_of(group_heads)
    metric = random_metric() * torch.logspace(0, -2, D)[:, None] * torch.logspace(0, -2, D)
    M = block_diagonal(metric, group_heads)
    rank = group_heads * D // 2
    errors = {}
    for basis in BASES:
        bases = BASES[basis](statistics, metric)
        C, up = doubles(bases.C, bases.D)
        lost = torch.eye(group_heads * D) - C[:, :, :rank] @ up[:, :rank]
        errors[basis] = float((lost @ M @ lost.mT @ statistics.value.covariance).diagonal(dim1=1, dim2=2).sum())
    assert errors["query"] < 0.9 * errors["pca"]


def test_joint_bases_beat_per_head_bases_at_equal_bytes():
    q, k, v = random_layer(2)
    errors = []
    for group_heads in (1, 2, HEADS):
        statistics = LayerStatistics(group_heads)
        statistics.add(q, k, v)
        bases = BASES["query"](statistics, random_metric())
        errors.append(score_error(q, k, *doubles(bases.A, bases.B, bases.key_mean), group_heads, group_heads * D // 2))
    assert errors == sorted(errors, reverse=True)


def test_a_block_diagonal_holds_each_head_on_its_place():
    blocks = torch.arange(4 * 9, dtype=torch.float64).view(4, 3, 3)
    out = block_diagonal(blocks, 2)
    assert torch.equal(out, torch.stack([torch.block_diag(*blocks[:2]), torch.block_diag(*blocks[2:])]))


class Attention(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_the_output_metric_sums_over_the_query_heads():
    linear = nn.Linear(6 * 5, 7, bias=False)
    M = output_metric(Attention(q_proj=nn.Linear(30, 30), dense=linear, norm=nn.LayerNorm(30)), 6, 3, 5)
    W = linear.weight.detach().double().numpy()
    for kv in range(3):
        parts = [W[:, (kv * 2 + g) * 5 : (kv * 2 + g + 1) * 5] for g in range(2)]
        np.testing.assert_allclose(M[kv].numpy(), sum(part.T @ part for part in parts), rtol=1e-10)


@pytest.mark.parametrize(
    "children, reason",
    [
        ({"q_proj": nn.Linear(30, 30)}, "none takes 30 inputs"),
        ({"dense": nn.Linear(30, 7), "gate": nn.Linear(30, 2)}, "dense, gate"),
    ],
)
def test_an_output_projection_that_is_not_found_is_named(children, reason):
    with pytest.raises(NotImplementedError, match=f"Attention has.*{reason}.*--basis pca"):
        output_metric(Attention(**children), 6, 3, 5)


@pytest.mark.parametrize("groups, batch, tokens, n", [(1, 1, 1, 1), (3, 2, 15, 5), (2, 3, 17, 16), (5, 1, 63, 7)])
def test_moments_equal_numpys(groups, batch, tokens, n):
    x = torch.randn(batch, groups, tokens, n, generator=torch.Generator().manual_seed(n)) * 3 + 100
    moments = Moments()
    moments.add(x)
    flat = x.double().transpose(0, 1).reshape(groups, -1, n).numpy()
    np.testing.assert_allclose(moments.mean.numpy(), flat.mean(1), rtol=1e-12)
    for g in range(groups):
        np.testing.assert_allclose(moments.second[g].numpy(), flat[g].T @ flat[g] / len(flat[g]), rtol=1e-12)
        want = np.cov(flat[g].T, bias=True).reshape(n, n)
        np.testing.assert_allclose(moments.covariance[g].numpy(), want, rtol=1e-7, atol=1e-9)


def test_streaming_in_parts_equals_the_whole():
    q, k, v = random_layer()
    whole, parts = LayerStatistics(2), LayerStatistics(2)
    whole.add(q, k, v)
    for start, stop in ((0, 1), (1, 64), (64, 333), (333, TOKENS)):
        parts.add(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop])
    for name in ("query", "key", "value"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert a.count == b.count
        torch.testing.assert_close(a.second, b.second, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)


def test_queries_are_summed_over_the_heads_of_a_kv_head():
    statistics, (q, _, _) = statistics_of(2)
    for kv in range(HEADS):
        want = sum(q[0, kv * QUERIES + g].T @ q[0, kv * QUERIES + g] / TOKENS for g in range(QUERIES))
        torch.testing.assert_close(statistics.query_second[kv], want)


def test_statistics_that_are_not_finite_are_refused():
    statistics, (q, k, v) = statistics_of(1)
    statistics.add(q, k * float("inf"), v)
    with pytest.raises(ValueError, match=r"layer 7 are not finite.*--dtype float32"):
        statistics.check(7)
