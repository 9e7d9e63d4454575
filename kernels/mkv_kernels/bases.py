# SPDX-License-Identifier: Apache-2.0
"""The bases of one layer as the kernels take them: cut to the ranks, gathered by runs of equal widths, on the device.

Shape legend, here and in `store` and `attend`: T tokens, G latent groups of a run, J KV heads of a group, M query heads
per KV head, d head size, n = J * d, Rk and Rv the stored coordinates of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mkv_kernels.codes import multipliers
from mkv_kernels.layout import GroupRun, PageLayout


@dataclass(frozen=True)
class RunBases:
    """Bases of the latent groups of one run, float32.

    Shapes:
        key_down:    [G, n, Rk]     first columns of A
        key_shift:   [G, Rk]        mean A, subtracted from projected keys
        query_up:    [G, J, d, Rk]  first columns of B, rows of each head, times `codes.multipliers` of the keys
        value_down:  [G, n, Rv]     first columns of C; None where C is folded into the weights
        value_shift: [G, Rv]        mean C, subtracted from projected values
        value_up:    [G, J, Rv, d]  first rows of D, columns of each head, times `codes.multipliers` of the values; None
                                    where D so multiplied is folded into the weights
        value_mean:  [G, J, d]      added to the output: the mean itself, or, where D is folded into the weights, mean C
                                    divided by the multipliers
    """

    run: GroupRun
    groups: torch.Tensor | None
    """Indices of the run's groups, [G]; None where they are all groups in their order."""
    key_down: torch.Tensor
    key_shift: torch.Tensor
    query_up: torch.Tensor
    value_down: torch.Tensor | None
    value_shift: torch.Tensor
    value_up: torch.Tensor | None
    value_mean: torch.Tensor

    @property
    def rank_k(self) -> int:
        return self.run.first.key.rank

    @property
    def rank_v(self) -> int:
        return self.run.first.value.rank


@dataclass(frozen=True)
class LayerBases:
    """Bases of one layer on one tensor-parallel rank, with the layout that they were cut for."""

    layout: PageLayout
    head_size: int
    group_heads: int
    runs: tuple[RunBases, ...]

    @classmethod
    def cut(
        cls,
        layout: PageLayout,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        key_mean: torch.Tensor,
        value_mean: torch.Tensor,
        head_size: int,
        fold_down: bool,
        fold_up: bool,
        device: torch.device | str = "cpu",
    ) -> LayerBases:
        """Cuts whole bases to a layout's ranks.

        Args:
            A, B, C, D: [groups, n, n] with A B^T = I and C D = I.
            key_mean, value_mean: [groups, n].
            fold_down: values arrive already multiplied by C.
            fold_up: the output is wanted as what D, its rows times `codes.multipliers` of the values, takes up again,
                which the weights after it do; needs n = d.
        """
        num_groups, n, _ = A.shape
        assert len(layout.widths) == num_groups
        assert not fold_up or n == head_size
        A, B, C, D, key_mean, value_mean = (
            tensor.to(device, torch.float32) for tensor in (A, B, C, D, key_mean, value_mean)
        )
        J = n // head_size
        value_mean_C = (value_mean[:, None] @ C)[:, 0]
        runs = []
        for run in layout.runs:
            g = torch.tensor(run.groups, device=device)
            rank_k, rank_v = run.first.key.rank, run.first.value.rank
            whole = run.groups == tuple(range(num_groups))
            steps_k, steps_v = (multipliers(side.widths).to(device) for side in (run.first.key, run.first.value))
            up = (D[g] * steps_v[:, None])[:, :rank_v].unflatten(2, (J, head_size)).transpose(1, 2).contiguous()
            mean = value_mean_C[g] / steps_v if fold_up else value_mean[g]
            runs.append(
                RunBases(
                    run=run,
                    groups=None if whole else g,
                    key_down=A[g, :, :rank_k].contiguous(),
                    key_shift=(key_mean[g][:, None] @ A[g, :, :rank_k])[:, 0],
                    query_up=(B[g] * steps_k)[:, :, :rank_k].unflatten(1, (J, head_size)).contiguous(),
                    value_down=None if fold_down else C[g, :, :rank_v].contiguous(),
                    value_shift=value_mean_C[g, :rank_v].contiguous(),
                    value_up=None if fold_up else up,
                    value_mean=mean.unflatten(1, (J, head_size)),
                )
            )
        return cls(layout, head_size, J, tuple(runs))


def with_orthonormal_exact_tiers(
    down: torch.Tensor, up: torch.Tensor, exact: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair that projects to the same subspaces, and whose 16-bit tiers have orthonormal coordinates.

    Quantisers want coordinates of equal variance. Rounded to the model's dtype, such coordinates would carry the error
    of an unusually large one into all others; orthonormal ones err as keys and values themselves do.

    Args:
        down, up: [groups, n, n] with down up^T = I.
        exact: coordinates of the 16-bit tier of every group.
    """
    down, up = down.clone(), up.clone()
    for group, size in enumerate(exact):
        q, r = torch.linalg.qr(down[group, :, :size].double())
        up[group, :, :size] = (up[group, :, :size].double() @ r.mT).to(up.dtype)
        down[group, :, :size] = q.to(down.dtype)
    return down, up
