"""Groups of photographs, the benchmark's table, and the experiment on real pairs."""

import pytest
import torch
from PIL import Image

from condgen.experiments import photo_pairs
from condgen.experiments.photo_pairs import (
    PHOTO_KINDS, benchmark, benchmark_text, paired_photos, photo_groups, photo_rows,
    photos_of, read_group)
from condgen.folders import FolderOrZip
from condgen.lab import Lab, find_experiment
from condgen.models.gated_transfer import GatedTransfer
from condgen.scenes import scene_pairs


def write(folder, **images):
    for name, x in images.items():
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def scene():
    return scene_pairs(48, 1, ("same", "other"), seed=5)


def test_references_stand_in_the_order_of_their_numbers():
    names = ["a/001_10.png", "a/001_2.png", "a/001_0.png", "a/002_1.png", "title.png",
             "b_input.jpg", "b_ref.png", "c_ref.png", "img_003.png", "d_0.png"]
    assert photo_groups(names) == {
        "a/001": ("a/001_0.png", ["a/001_2.png", "a/001_10.png"]),
        "b": ("b_input.jpg", ["b_ref.png"])}
    for few in ([], ["img_001.png", "c_ref.png"], ["d_0.png"]):
        with pytest.raises(ValueError, match="NAME_input.png and NAME_ref.png"):
            photo_groups(few)


def test_sides_are_cut_so_that_4_divides_them(tmp_path, scene):
    write(tmp_path, x_0=scene["x"][0][:, :46, :45], x_1=scene["reference"][0])
    files = FolderOrZip(tmp_path)
    image, [reference] = read_group(files, photo_groups(files.images())["x"])
    assert torch.equal(image, scene["x"][0][:, :44, :44] / 255)
    assert torch.equal(reference, scene["reference"][0] / 255)


def test_the_benchmark_names_each_way_and_published_numbers(tmp_path, scene):
    write(tmp_path, x_0=scene["x"][0], x_1=scene["reference"][0],
          x_2=scene["reference"][1], y_0=scene["x"][0], y_1=scene["reference"][1])
    torch.manual_seed(0)
    model = GatedTransfer((3, 32, 32), 4, 1, 4, 1)
    found = benchmark(tmp_path, model, progress=False)
    assert [*found] == ["bicubic", "without a reference", "first reference",
                        "all references"]
    one = benchmark(tmp_path, model, limit=1)
    assert one["bicubic"] == pytest.approx(found["bicubic"])  # the same image twice
    assert one["all references"] != one["first reference"]
    text = benchmark_text(found)
    assert "26.24" in text and f"{found['bicubic']['psnr']:.2f}" in text


def test_a_broken_photo_is_named(tmp_path, scene):
    write(tmp_path, x_0=scene["x"][0])
    (tmp_path / "x_1.png").write_text("no image")
    with pytest.raises(ValueError, match="x_1.png"):
        benchmark(tmp_path)


def groups(n):
    drawn = scene_pairs(36, n, ("same",), seed=6)
    return [(x / 255, [r / 255]) for x, r in zip(drawn["x"], drawn["reference"])]


def test_photographs_of_any_size_become_square():
    big, small = groups(1)[0][0], torch.rand(3, 20, 24)
    data = paired_photos([(big, [small])] * 4, 32)
    table = data.table("train")
    assert table["x"].shape[1:] == table["reference"].shape[1:] == (3, 32, 32)
    assert torch.equal(table["x"][0] / 255, big[:, 2:34, 2:34])
    own = table["reference"][table["kind"] == 0][0]
    assert torch.equal(own[:, :20, :24], (255 * small).round().byte())


def test_rows_of_all_methods_and_references(monkeypatch, tmp_path):
    data = paired_photos(groups(12), 32)
    monkeypatch.setattr(photo_pairs, "photos_of", lambda tier: data)
    lab = Lab(find_experiment("srntt/photographs"), "tiny", 0, tmp_path, rounds=1,
              progress=False)
    rows = photo_rows(lab)
    seen = {(r["model"], r["variant"], r["at"]["reference"]) for r in rows}
    for name in ("gated transfer", "gated-upscaler"):
        assert {kind for model, _, kind in seen if model == name} >= set(PHOTO_KINDS)
    assert ("SISR", "longer", "none") in seen and ("bicubic", "", "none") in seen


def test_missing_pairs_are_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    photos_of.cache_clear()
    with pytest.raises(FileNotFoundError, match="photo_pairs160.zip"):
        photos_of("tiny")
