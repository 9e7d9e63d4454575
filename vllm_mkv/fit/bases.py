# SPDX-License-Identifier: Apache-2.0
"""Bases from moments: nested in the rank, the first columns the most important.

Shapes: G latent groups, J heads per group, d head size, n = J d. All matrices come in and are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mkv_kernels.layout import BLOCK
from vllm_mkv.adapter import LayerBases
from vllm_mkv.fit.statistics import LayerStatistics

LEAST_SHARE, LARGEST_SHARE = 1e-6, 1.0
"""Of the mean eigenvalue, what is added to every eigenvalue before a covariance is inverted."""
LEAST_SHARE_OF_BLOCK = 1e-4
"""Of the largest variance along a direction of a block, what whitening takes that along any other for at least."""
INVERSE_TARGET = 1e-5
"""Largest entry of `A B^T - I` in float32 that is good enough: a hundredth of what an adapter may have."""


def pca_bases(statistics: LayerStatistics, output: Tensor | None) -> LayerBases:
    """Eigenvectors of the covariances of keys and values: A = B = U and C = D^T = U."""
    keys, values = (
        np.ascontiguousarray(torch.linalg.eigh(covariance).eigenvectors.flip(-1).float().cpu().numpy())
        for covariance in (statistics.key_covariance, statistics.value.covariance)
    )
    return _layer_bases(statistics, (keys, keys), (values, values))


def query_bases(statistics: LayerStatistics, output: Tensor | None) -> LayerBases:
    """The pairs that minimise E[(q.k - q'.k')^2] and E[|(v - v^) W_O|^2] at every rank.

    `output` [Hkv, d, d] is the sum over the query heads of a KV head of W_O W_O^T.
    """
    assert output is not None
    J = statistics.group_heads
    return _layer_bases(
        statistics,
        dual_pair(block_diagonal(statistics.query_second, J), statistics.key_covariance),
        dual_pair(block_diagonal(output, J), statistics.value.covariance),
    )


BASES: dict[str, Callable[[LayerStatistics, Tensor | None], LayerBases]] = {"pca": pca_bases, "query": query_bases}


def _layer_bases(
    statistics: LayerStatistics, keys: tuple[np.ndarray, np.ndarray], values: tuple[np.ndarray, np.ndarray]
) -> LayerBases:
    D = np.ascontiguousarray(values[1].swapaxes(-1, -2))
    means = (mean.float().cpu().numpy() for mean in (statistics.key_mean, statistics.value.mean))
    return LayerBases(*keys, values[0], D, *means)


def dual_pair(metric: Tensor, covariance: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A and B, float32 [G, n, n], with A B^T = I, that minimise tr(M E[e e^T]) for e = x - B A^T x at every rank.

    With S Sigma T^T the singular value decomposition of M^1/2 C^1/2: A = C^-1/2 T Sigma^1/2, B = M^-1/2 S Sigma^1/2.
    M and C are regularised as little as float32 allows: just enough for A B^T = I to survive the rounding of A and B.

    Args:
        metric: M, [G, n, n], the weight of an error: of queries for keys, of the output projection for values.
        covariance: C, [G, n, n], of what is projected.
    """
    identity = torch.eye(metric.shape[-1], dtype=torch.float64, device=metric.device)
    share = LEAST_SHARE
    while True:
        root_m, _ = _roots(metric, share)
        root_c, inverse_c = _roots(covariance, share)
        _, sigma, Tt = torch.linalg.svd(root_m @ root_c)
        scale = sigma.sqrt().unsqueeze(-2)
        A = (inverse_c @ Tt.mT * scale).float()
        # In place of M^-1/2 S Sigma^1/2: the inverse of A as rounded leaves the rounding of B as the only error.
        B = torch.linalg.inv(A.double()).mT.float()
        if float((A @ B.mT - identity.float()).abs().max()) <= INVERSE_TARGET:
            return A.cpu().numpy(), B.contiguous().cpu().numpy()
        share *= 10
        assert share <= LARGEST_SHARE, "a pair of matrices this well conditioned must invert in float32"


def _roots(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of a symmetric matrix, `share` of its mean eigenvalue added to its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    mean = values.mean(-1, keepdim=True)
    # A side that never varies has no direction of its own, and any basis is as good as another.
    root = (values + share * torch.where(mean > 0, mean, 1.0)).sqrt().unsqueeze(-2)
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def block_diagonal(blocks: Tensor, group_heads: int) -> Tensor:
    """[G J, d, d] -> [G, n, n], the J heads of a group on the diagonal."""
    H, d, _ = blocks.shape
    J = group_heads
    out = blocks.new_zeros(H // J, J, d, J, d)
    heads = torch.arange(J, device=blocks.device)
    out[:, heads, :, heads] = blocks.view(H // J, J, d, d).transpose(0, 1)
    return out.view(H // J, J * d, J * d)


TRAINED = "trained"
"""The basis kind of adapters whose coordinates were trained, their sizes and what is inside of blocks too."""


def whitened(bases: LayerBases, statistics: LayerStatistics) -> LayerBases:
    """The same nested blocks of 16 coordinates, each of unit covariance and then rotated by a Hadamard matrix.

    So the coordinates of a block look alike, and like those of any other block, as one quantiser for all wants them.
    The subspaces do not change, and it does not matter whether the bases were whitened before.
    """
    A, B = _whiten(bases.A, statistics.key_covariance)
    C, D = _whiten(bases.C, statistics.value.covariance)
    return replace(bases, A=A, B=B, C=C, D=np.ascontiguousarray(D.swapaxes(-1, -2)))


def _whiten(down: np.ndarray, covariance: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """From `down`, float32 [G, n, n], and the covariance of what it projects, [G, n, n]: a pair with down up^T = I."""
    blocks = torch.from_numpy(down).to(covariance).unflatten(-1, (-1, BLOCK)).transpose(1, 2)
    # Variances along orthogonal directions of unit length, whatever the lengths and angles of the columns were before.
    plane, _ = torch.linalg.qr(blocks)
    values, vectors = torch.linalg.eigh(plane.mT @ covariance[:, None] @ plane)
    # A direction that hardly varied is not blown up without bound: it might vary where the model is served, and beside
    # directions that vary much it would leave little of float32 to them.
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    most = values.amax(-1, keepdim=True)
    least = torch.maximum(LEAST_SHARE * torch.where(mean > 0, mean, 1.0), LEAST_SHARE_OF_BLOCK * most)
    turn = vectors * torch.maximum(values, least).rsqrt()[..., None, :] @ hadamard(BLOCK).to(vectors)
    new_down = (plane @ turn).transpose(1, 2).flatten(-2).float()
    new_up = torch.linalg.inv(new_down.double()).mT.float().contiguous()
    return new_down.cpu().numpy(), new_up.cpu().numpy()


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of entries +-1 / sqrt(size), [size, size] float64: symmetric, its own inverse.

    `size` is a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def block_metrics(bases: LayerBases, statistics: LayerStatistics, output: Tensor | None) -> Tensor:
    """What an error e in the coordinates of a block adds to the squared error of scores or outputs: e^T (metric) e.

    For keys, to E[(q.k - q.k^)^2] summed over query heads; for values, to E[|(v - v^) W_O|^2]. `output` is as in
    `query_bases`; None counts the error of v itself.

    Returns:
        float64 [G, 2, blocks, 16, 16], keys before values.
    """
    J = statistics.group_heads
    queries = block_diagonal(statistics.query_second, J)
    identity = torch.eye(queries.shape[-1]).to(queries)
    of_inputs = (queries, identity if output is None else block_diagonal(output.to(queries), J))
    of_blocks = []
    for side, metric in zip((bases.B, bases.D.swapaxes(-1, -2)), of_inputs, strict=True):
        up = torch.from_numpy(np.ascontiguousarray(side)).to(metric).unflatten(-1, (-1, BLOCK))
        of_blocks.append(torch.einsum("gnbi,gnm,gmbj->gbij", up, metric.expand(len(up), -1, -1), up))
    return torch.stack(of_blocks, dim=1)


INPUT_PROJECTIONS = frozenset(
    [
        *("q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv"),
        *("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "in_proj"),
    ]
)
"""Names that modules before the attention go by, one each for q, k and v or one for all."""

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def output_metric(attention: nn.Module, num_heads: int, num_kv_heads: int, head_size: int) -> Tensor:
    """The sum over the query heads of a KV head of W_O W_O^T, [Hkv, d, d] in float64.

    W_O is the module `o_proj`, or else the only child of the attention module that takes all heads side by side.

    Raises:
        NotImplementedError: no such module, or its weight is not plain; names the attention module.
    """
    width = num_heads * head_size
    candidates = {
        name: weight
        for name, child in attention.named_children()
        if name not in INPUT_PROJECTIONS and (weight := _plain_weight(child)) is not None and weight.shape[1] == width
    }
    if "o_proj" in candidates:
        candidates = {"o_proj": candidates["o_proj"]}
    if len(candidates) != 1:
        raise NotImplementedError(
            f"{type(attention).__name__} has {len(candidates) or 'no'} plain linear modules that could be its output "
            f"projection ({', '.join(candidates) or f'none takes {width} inputs'}); use --basis pca, which needs none"
        )
    (weight,) = candidates.values()
    heads = weight.double().T.reshape(num_kv_heads, num_heads // num_kv_heads, head_size, -1)
    return torch.einsum("hgdo,hgeo->hde", heads, heads)


def _plain_weight(module: nn.Module) -> Tensor | None:
    """[outputs, inputs] of a linear module whose weight is a plain floating-point matrix."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in PLAIN_DTYPES:
        return None
    if isinstance(module, nn.Linear):
        return weight.detach() if weight.shape == (module.out_features, module.in_features) else None
    # GPT-2's Conv1D is a linear module with a transposed weight.
    return weight.detach().T if type(module).__name__ == "Conv1D" else None
