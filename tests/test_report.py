"""The table and the heat map: what they say is what the stats hold."""

import re
import sys
import types

import pytest
import torch
from rich.console import Console

from drllm_fast import report
from drllm_fast.stats import RoutingStats


def stats(plan, tokens=None):
    plan = torch.as_tensor(plan, dtype=torch.int8)
    rows, layers = plan.shape
    tokens = torch.full((rows,), 64) if tokens is None else torch.as_tensor(tokens)
    return RoutingStats(
        plan=plan,
        tokens=tokens,
        cached=tokens,
        layer_rows=plan.sum(0, dtype=torch.int64),
        layer_tokens=(plan.long() * tokens[:, None]).sum(0),
        kv_bytes_per_token=torch.full((layers,), 1024),
        kv_window=torch.zeros(layers, dtype=torch.int64),
        forwards=1,
    )


def line_of(text, word):
    return re.split(r"\s{2,}", next(line for line in text.splitlines() if word in line).strip())


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], "-"), ([4], "4"), ([4, 5], "4-5"), ([0, 19, 20, 21, 29], "0 19-21 29"), (range(30), "0-29")],
)
def test_ranges(numbers, text):
    assert report.ranges(numbers) == text


def test_ranges_that_do_not_fit_are_counted():
    numbers = [0, 2, 4, 6, 8, 10, 12, 14, 20, 21, 22]
    text = report.ranges(numbers, width=14)
    assert len(text) <= 14 and text == "0 2 4 6 .. +7"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (102400, "100 KiB"), (1 << 20, "1.00 MiB"), (5 << 40, "5.00 TiB")],
)
def test_human_bytes(count, text):
    assert report.human_bytes(count) == text


def test_one_line_a_prompt_and_totals():
    s = stats([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 2, 1]], tokens=[10, 20, 30])
    text = report.summary(s, labels=["plain", "skips [some]", "repeats"])
    assert max(map(len, text.splitlines())) <= 120
    assert line_of(text, "plain") == ["plain", "10", "4 of 4", "-", "-", "100.0 %", "40.0 / 40.0 KiB"]
    skips = ["skips [some]", "20", "2 of 4", "1-2", "-", "50.0 %", "40.0 / 80.0 KiB"]
    assert line_of(text, "skips [some]") == skips
    assert line_of(text, "repeats")[3:6] == ["-", "2", "125.0 %"]
    share = 100 * (40 + 40 + 150) / 240
    total = ["3 prompts", "60", "3.7 of 4", "2 skips", "1 repeat", f"{share:.1f} %", "230 / 240 KiB"]
    assert line_of(text, "3 prompts") == total


def test_at_most_32_lines_and_totals_of_all():
    s = stats(torch.ones(40, 5))
    text = report.summary(s)
    assert "row 31" in text and "row 32" not in text
    assert line_of(text, "more") == ["... and 8 more"]
    assert line_of(text, "40 prompts")[1] == str(40 * 64)
    assert "more" not in report.summary(stats(torch.ones(32, 5)))


def test_wide_plans_keep_one_line_a_row():
    plan = torch.ones(8, 126)
    plan[:, ::2], plan[:, 1::4] = 0, 2
    lines = report.summary(stats(plan), labels=["a prompt with quite a number of words " * 3] * 8).splitlines()
    rows = [line for line in lines if line.lstrip().startswith("a prompt")]
    assert len(rows) == 8 and max(map(len, lines)) <= 120
    assert all("0 2 4 6 8 .. +58" in row and "1 5 9 13 17 .. +27" in row and row.endswith("MiB") for row in rows)


def test_short_lists_fit_80_columns():
    plan = torch.ones(3, 30)
    plan[:, 3], plan[:, 17], plan[:, 27] = 0, 0, 2
    text = report.summary(stats(plan), labels=["a prompt with quite a number of words " * 3] * 3, width=80)
    rows = [line for line in text.splitlines() if line.lstrip().startswith("a prompt")]
    assert len(rows) == 3 and max(map(len, text.splitlines())) <= 80
    assert all(re.search(r"29 of 30 +3 17 +27 +96.7 % +1\.81 / 1\.88 MiB$", row) for row in rows), text


@pytest.mark.parametrize(
    ("held", "dense", "text"),
    [
        (0, 0, "0 / 0 B"),
        (5, 900, "5 / 900 B"),
        (1024, 2048, "1.00 / 2.00 KiB"),
        (3 << 20, 2 << 20, "3.00 / 2.00 MiB"),
        (1, 1 << 30, "0.00 / 1.00 GiB"),
    ],
)
def test_two_counts_share_a_unit(held, dense, text):
    assert report.human_pair(held, dense) == text


def test_labels_text_ids_and_mistakes():
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: f"<{'-'.join(map(str, ids))}>")
    s = stats(torch.ones(2, 3))
    assert "<7-8>" in report.summary(s, tokenizer, labels=[[7, 8], "text"])
    assert "a[31mb" in report.summary(s, labels=["a\x1b[31m\x07b", "text"])
    assert "two lines" in report.summary(s, labels=["two\n  lines", "text"])
    with pytest.raises(ValueError, match="3 labels for a plan of 2 rows"):
        report.summary(s, labels=["a", "b", "c"])
    with pytest.raises(TypeError, match="tokenizer="):
        report.summary(s, labels=[[7, 8], [9]])
    with pytest.raises(TypeError, match="one label a row"):
        report.summary(s, labels="ab")


def test_the_table_is_a_rich_table(capsys):
    Console(width=120).print(report.summary_table(stats(torch.ones(1, 3)), labels=["[red]not markup[/red]"]))
    assert "[red]not markup[/red]" in capsys.readouterr().out


def cells(figure):
    """The colour drawn for each cell, read back from the rendered picture: [rows][layers] of 'skip' and so on."""
    import matplotlib.colors

    canvas = figure.canvas
    canvas.draw()
    picture = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    picture = picture.view(height, width, 4)[..., :3].float()
    axes = figure.axes[0]
    names, table = list(report.NAMES.values()), [matplotlib.colors.to_rgb(c) for c in report.COLOURS.values()]
    table = torch.tensor(table) * 255
    rows, layers = axes.images[0].get_array().shape
    out = []
    for row in range(rows):
        line = []
        for layer in range(layers):
            x, y = axes.transData.transform((layer + 0.02, row + 0.02))
            colour = picture[height - 1 - round(y), round(x)]
            line.append(names[int((table - colour).abs().sum(1).argmin())])
        out.append(line)
    return out


def axes_y(figure, row):
    return figure.axes[0].transData.transform((0, row))[1]


def test_each_cell_has_the_colour_of_its_decision():
    plan = torch.tensor([[1, 0, 2, 1], [0, 0, 1, 2], [2, 1, 1, 0]], dtype=torch.int8)
    figure = report.plot_plan(plan)
    assert cells(figure) == [[report.NAMES[value] for value in row] for row in plan.tolist()]
    top, bottom = axes_y(figure, 0), axes_y(figure, 2)
    assert top > bottom, "the first prompt belongs on top"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["skip (4)", "execute (5)", "repeat (3)"]
    assert figure.axes[0].get_title(loc="left") == "3 prompts: 3.7 of 4 blocks on average (91.7 %)"


def test_one_colour_everywhere_keeps_its_meaning():
    """A plan of one value must not be stretched to another colour."""
    for value, name in report.NAMES.items():
        assert cells(report.plot_plan([[value, value]])) == [[name, name]]


@pytest.mark.parametrize(("rows", "layers"), [(1, 1), (1, 30), (64, 30), (65, 4), (256, 126)])
def test_sizes_and_integer_ticks(rows, layers):
    figure = report.plot_plan(stats(torch.ones(rows, layers)), labels=[f"cost $5 and {r}" for r in range(rows)])
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    assert 4 <= width <= 18 and 1 <= height <= 12
    axes = figure.axes[0]
    ticks = [t for t in axes.get_xticks() if -0.5 <= t <= layers - 0.5]
    assert ticks and all(t == int(t) for t in ticks)
    written = [t.get_text() for t in axes.get_yticklabels()]
    assert rows > 64 or not any(t.get_parse_math() for t in axes.get_yticklabels()), "$ in a prompt is no formula"
    if rows <= 64:
        assert written == [f"cost $5 and {r}" for r in range(rows)]
    else:
        assert 2 <= len(written) <= 14


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")]
)
def test_saving(tmp_path, suffix, magic):
    path = tmp_path / f"plan.{suffix}"
    report.plot_plan([[0, 1, 2]], path, title="a [title] with $ signs $")
    assert path.read_bytes().startswith(magic)


@pytest.mark.filterwarnings("error")
def test_labels_that_the_font_lacks_do_not_warn(tmp_path):
    report.plot_plan([[0, 1, 2]], tmp_path / "plan.png", labels=["\U0001f600 \u4f60\u597d \u0928\u092e"])


def test_plotting_leaves_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    report.plot_plan([[0, 1, 2]])
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("plan", [[[0, 3]], [[-1, 0]], [[0.5, 1.0]], [[[1]]], torch.ones(0, 3, dtype=torch.int8)])
def test_bad_plans(plan):
    with pytest.raises(ValueError, match=r"\[rows, layers\]"):
        report.plot_plan(plan)


def test_bad_file_ending_is_refused_before_drawing(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        report.plot_plan([[1]], tmp_path / "plan.docx")


def test_without_matplotlib(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "drllm-fast\[plot\]"'):
        report.plot_plan([[1]])
