# SPDX-License-Identifier: Apache-2.0
"""What `vllm-mkv info` shows of an allocation: bits by layer, latent group and side, as a table and as a heatmap."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mkv_kernels.layout import WIDTHS
from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import Allocation, AllocationPath, CacheShape
from vllm_mkv.cli import main
from vllm_mkv.evaluation.report import nested_lines
from vllm_mkv.evaluation.widths import draw_widths, widths_table


def printed(allocation, columns=200):
    console = Console(file=io.StringIO(), width=columns)
    console.print(widths_table(allocation))
    return console.file.getvalue()


def rows(allocation):
    """The cells of every row, without those that are empty."""
    lines = [line.split("│")[1:-1] for line in printed(allocation).splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def mixed_allocation():
    """One layer of five latent groups of 64, of which the middle three are alike."""
    alike = ((8, 4, 4, 2), (4, 4, 4, 4))
    groups = (((16, 16, 8, 0), (2, 2, 0, 0)), alike, alike, alike, ((0, 0, 0, 0), (4, 4, 4, 4)))
    return Allocation(CacheShape(1, 5, 64), (groups,))


def test_tiers_are_listed_by_layer_side_and_group():
    assert rows(mixed_allocation()) == [
        ["0", "0: 16b:32 8b:16 0b:16", "4.70", "0: 2b:32 0b:32", "3.40"],
        ["1-3: 8b:16 4b:32 2b:16", "1-4: 4b:64"],
        ["4: 0b:64"],
        ["all", "16b:32 8b:64 4b:96 2b:48 0b:80", "4.70", "4b:256 2b:32 0b:32", "3.40"],
    ]


def test_a_single_group_has_no_number():
    shape = CacheShape(2, 1, 192)
    allocation = Allocation(shape, (((((16,) * 2 + (4,) * 6 + (2,) * 4), (16,) * 12),),) * 2)
    assert rows(allocation)[0] == ["0", "16b:32 4b:96 2b:64", "5.33", "16b:192", "16.00"]


@pytest.mark.parametrize("budget", [1.0, 0.75, 0.5, 0.3])
def test_16_bits_or_none_are_ranks(uneven_path, budget):
    shape = CacheShape(3, 4, 64)
    allocation = uneven_path(shape).replay(budget)
    ranks = allocation.ranks
    *layers, total = rows(allocation)
    for found, of_layer in zip(layers, ranks, strict=True):
        key, value = of_layer.T
        assert found[1] == " ".join(map(str, key))
        assert found[2] == f"{key.min()}/{key.mean():.1f}/{key.max()}"
        assert found[3] == f"{key.mean() / 4:.2f}"
        assert found[4] == " ".join(map(str, value))
    key, value = ranks[..., 0], ranks[..., 1]
    assert total[1:3] == [f"{key.min()}/{key.mean():.1f}/{key.max()}", f"{key.mean() / 4:.2f}"]
    assert total[3:] == [f"{value.min()}/{value.mean():.1f}/{value.max()}", f"{value.mean() / 4:.2f}"]
    assert "b:" not in printed(allocation)


def shares(file):
    """How much of a picture has the colour of each width."""
    from matplotlib import colormaps
    from matplotlib.image import imread

    pixels = 255 * imread(file)[::2, ::2, :3].reshape(-1, 3)
    colours = 255 * colormaps["cividis"].resampled(len(WIDTHS))(np.arange(len(WIDTHS)))[:, :3]
    # Written in 8 bits, which may be rounded or cut off.
    found = [(np.abs(pixels - colour) < 1.01).all(1).mean() for colour in colours]
    return dict(zip(sorted(WIDTHS), found, strict=True))


def test_colours_are_widths(tmp_path):
    shape = CacheShape(4, 2, 128)
    for width in WIDTHS:
        draw_widths(Allocation(shape, (((((width,) * 8),) * 2,) * 2,) * 4), "all alike", tmp_path / "a.png")
        found = shares(tmp_path / "a.png")
        assert found.pop(width) > 0.4
        assert all(0 < share < 0.05 for share in found.values()), "only the colour bar has the others"


@pytest.mark.parametrize("layers, groups, blocks", [(1, 1, 1), (80, 32, 64), (1, 32, 4), (80, 1, 64), (3, 2, 8)])
def test_all_sizes_are_shown(tmp_path, layers, groups, blocks):
    widths = (16, 0) if groups == 1 else WIDTHS
    grid = np.random.default_rng(0).choice(widths, (layers, groups, 2, blocks))
    falling = np.sort(grid)[..., ::-1].tolist()
    found = tuple(tuple(tuple(map(tuple, group)) for group in layer) for layer in falling)
    allocation = Allocation(CacheShape(layers, groups, 16 * blocks), found)
    draw_widths(allocation, "at random", tmp_path / "plot.png")
    assert sum(shares(tmp_path / "plot.png").values()) > 0.3
    assert widths_table(allocation).row_count == layers + 1
    assert printed(allocation, columns=80)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_info_of_an_adapter_with_tiers(tiny_model, make_adapter, tmp_path, capsys, monkeypatch, ending):
    monkeypatch.setenv("COLUMNS", "140")
    path = AllocationPath.uniform(CacheShape(3, 4, 32), widths=(16, 8, 4, 2, 0))
    folder = make_adapter(tiny_model("llama"), 1, path=path)
    plot = tmp_path / f"widths.{ending}"
    assert main(["info", str(folder), "--budget", "0.3907", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "steps through 16, 8, 4, 2, 0 bits" in out
    assert "600 instead of 1,536" in out
    assert out.count("0-3: 8b:16 4b:16") == 6
    assert out.count("6.00") == 8
    assert plot.stat().st_size > 1000


def test_what_an_adapter_says_is_no_markup(tiny_model, make_adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    adapter = Adapter.load(make_adapter(tiny_model("llama"), 1))
    row = {"name": "[/x]", "budget": 1.0, "bytes_per_token": 1, "perplexity": 1.0, "kl": 0.0, "top1": 1.0}
    made = {"text": ["a/[/b]/t.txt", "more"], "tokens": 5, "search": {"by": "hand", "widths": [16, 0], "tried": {}}}
    changes = {"made": made, "base_model_name_or_path": "[bold]m[/]", "quality": [row]}
    folder = tmp_path / "[/f]"
    replace(adapter, config=adapter.config.model_copy(update=changes)).save(folder, "")
    assert main(["info", str(folder), "--plot", str(tmp_path / "[/p].png")]) == 0
    out = capsys.readouterr().out
    for expected in ("[bold]m[/]", str(folder), "[/x]", "drew " + str(tmp_path / "[/p].png")):
        assert expected in out
    lines = [line.split("made", 1)[-1].strip() for line in out.splitlines()]
    expected = ["text a/[/b]/t.txt, more", "tokens 5", "search", "by hand", "widths 16, 0", "tried"]
    start = lines.index(expected[0])
    assert lines[start : start + len(expected)] == expected
    assert nested_lines({"a": {"b": {"c": 1}}}) == ["a", "  b", "    c 1"]


@pytest.mark.parametrize("plot", ["widths.foo", "nowhere/widths.png"])
def test_a_plot_that_cannot_be_is_refused_before_anything_is_printed(tiny_model, make_adapter, tmp_path, capsys, plot):
    assert main(["info", str(make_adapter(tiny_model("llama"), 1)), "--plot", str(tmp_path / plot)]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("vllm-mkv: error: ")
