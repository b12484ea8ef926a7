"""Figures: sheets keep their pixels, shapes and values are checked, pages need
nothing and escape everything.
"""

import io
import re

import pytest
import torch
from PIL import Image

from condgen import figures as fg
from condgen import files


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def images(n: int, c: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(("n", "rows", "shape"), [
    (6, 2, (17, 26)), (7, 2, (17, 35)), (9, None, (26, 26)), (1, None, (8, 8))])
@pytest.mark.parametrize("channels", [1, 3])
def test_sheet(n, rows, shape, channels):
    x = images(n, channels)
    s = fg.sheet(x, rows)
    assert s.dtype == torch.uint8 and s.shape == (*shape, 3)
    assert s[:8, :8].equal(
        (x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).expand(8, 8, 3))
    assert fg.sheet(x, rows, gap=(3, 2), zoom=2)[:16:2, :16:2].equal(s[:8, :8])


@pytest.mark.parametrize("draw", [
    fg.sheet, fg.image_grid, lambda x: fg.traversal(x.view(2, 2, 1, 8, 8)),
    lambda x: fg.save_image(x, "none/a.png")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_no_numbers_are_counted(draw, value):
    x = images(4)
    x[1, 0, 2, 2] = x[3] = value
    with pytest.raises(ValueError, match="^2 of 4 images have values that are infinite"):
        draw(x)


def test_figures_refuse_invalid_arguments():
    for bad in (images(4) * 1.1, images(4) - 1, images(4)[0], images(4, 2),
                images(4)[:0], images(4) * torch.nan):
        with pytest.raises(ValueError, match="accepted"):
            fg.sheet(bad)
    with pytest.raises(ValueError, match="3 labels for 4 images"):
        fg.image_grid(images(4), labels=[1, 2, 3])
    with pytest.raises(ValueError, match="rows, columns"):
        fg.traversal(images(4))
    with pytest.raises(ValueError, match="3 row labels for 2 rows"):
        fg.traversal(images(4).view(2, 2, 1, 8, 8), "abc")
    for rows in ([], [{"stage": "a", "images": 1, "seconds": 2}]):
        with pytest.raises(ValueError, match="nothing to draw"):
            fg.training_curves(rows)


def test_figures_are_saved_as_small_png():
    fg.set_style()
    rows = [{"stage": "a" if i < 3 else "b", "images": 10 * i, "player.loss": i,
             "validation": 1.0}
            for i in range(1, 6)]
    table = fg.traversal(images(6, 3).view(2, 3, 3, 8, 8), ("r", "s"), (1, 2, 3), "T")
    assert [t.get_text() for t in table.axes[0].get_xticklabels()] == ["1", "2", "3"]
    run = fg.training_curves(rows)
    assert ([ax.get_title() for ax in run.axes] == ["player", "validation"]
            and len(run.axes[0].lines) == 2)
    for figure in (fg.image_grid(images(10), rows=2, labels=range(10), title="T"),
                   fg.image_grid(images(5, 3, 64)), table, run):
        raw = fg.figure_png(figure)
        picture = Image.open(io.BytesIO(raw))
        assert picture.format == "PNG" and len(raw) < 100_000 and min(picture.size) > 50


def test_saved_image_is_the_sheet(tmp_path):
    x = images(4, 3)
    path = fg.save_image(x, tmp_path / "new" / "a.png")
    with Image.open(path) as picture:
        assert picture.size == (258, 258)
        assert picture.getpixel((0, 0)) == tuple(
            (x[0, :, 0, 0] * 255).round().int().tolist())
    with pytest.raises(ValueError, match=r"a\.txt.*accepted: \.png"):
        fg.save_image(x, tmp_path / "a.txt")


@pytest.mark.parametrize("write", [
    lambda path: fg.save_image(images(4), path),
    lambda path: fg.save_figure(fg.image_grid(images(4)), path),
    lambda path: fg.write_report(path, "title", [])])
def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch, write):
    old = tmp_path / "a.png"
    old.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*a.png: No space left on device"):
        write(old)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


@pytest.mark.parametrize("shape, size", [
    ((16, 1, 16, 16), (518, 518)), ((8, 3, 32, 32), (518, 258)),
    ((100, 1, 16, 16), (658, 658)), ((1, 3, 128, 128), (128, 128))])
def test_a_few_small_images_become_a_large_picture(tmp_path, shape, size):
    from PIL import Image

    path = fg.save_image(torch.rand(shape), tmp_path / "a.png")
    assert Image.open(path).size == size


def test_report(tmp_path):
    evil = "<script>alert('&')</script>"
    sections = [
        fg.ReportSection(evil, f"{evil}\n\nsecond", fg.image_grid(images(4)),
                         f'{evil}" onerror="x'),
        fg.ReportSection("Numbers", table=[["", evil], [evil, 1.5]]),
        fg.ReportSection("Bytes", figure=fg.figure_png(fg.image_grid(images(4)))),
    ]
    text = fg.write_report(tmp_path / "runs" / "report.html", evil, sections,
                           evil).read_text(encoding="utf-8")
    assert "<script" not in text and 'onerror="' not in text and "<p>second</p>" in text
    assert not re.search(r"https?:|url\(|@import|<link", text)
    assert text.count("data:image/png;base64,") == 2 and "<td>1.5</td>" in text
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["report.html"]
