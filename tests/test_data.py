"""Data sets: fixed fingerprints, disjoint parts, and readers that refuse what
is broken or hostile.
"""

import gzip
import io
import os
import stat
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condgen import data, downloads, faces, files, folders
from condgen import images as image_files
from condgen.conditions import Binary, Classes, Code, Real, Schema

MNIST = Path(os.environ.get("CONDGEN_DATA", "nowhere")) / "MNIST" / "raw"


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees this machine's data, nor the network."""
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(mode="RGB", size=(12, 9), color=None, kind="PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color if color is not None else (
        200 if mode in ("L", "I;16") else (200, 50, 10))).save(stream, kind)
    return stream.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items():
            z.writestr(name, raw)
    return path


def squares(path: Path, table: str | bytes, n: int = 10) -> Path:
    return archive(path,
                   {**{f"{i}.png": picture() for i in range(n)}, "labels.csv": table})


def column(name: str, *values: object) -> str:
    return "\n".join([f"file,{name}", *(f"{i}.png,{v}" for i, v in enumerate(values))])


# data sets ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sha"),
                         [(8, "35eeb128"), (16, "00acdbfd"), (32, "3b08caea")])
def test_digits_are_the_same_everywhere(size, sha):
    d = data.digits(size)
    assert d.sha256.startswith(sha)
    assert d.shape == (1, size, size) and d.conditions == Schema([Classes("digit", 10)])
    assert {s: len(i) for s, i in d.splits.items()} == {"test": 360, "val": 180,
                                                        "train": 1257}
    assert torch.cat(list(d.splits.values())).sort().values.equal(torch.arange(1797))
    assert d.table("test")["c"].sum(0).tolist() == [36] * 10
    x = d.split_images("val")
    assert (
        x.dtype == torch.float32
        and x.min() == 0
        and x.max() == 1
        and (x * 255).round().to(torch.uint8).equal(d.table("val")["x"])
    )


def test_copies_extend_the_training_part_only():
    d, more = data.digits(8), data.digits(8, copies=3)
    assert len(more.splits["train"]) == 4 * 1257 and "3 copies" in more.name
    for part in ("val", "test"):
        assert all(a.equal(b) for a, b in zip(d.table(part).values(),
                                              more.table(part).values(), strict=True))
    old, new = d.table("train"), more.table("train")
    assert new["c"].equal(old["c"].repeat(4, 1)) and new["x"][:1257].equal(old["x"])
    moved = (new["x"][1257:].view(3, 1257, -1).float()
             - old["x"].flatten(1).float()).abs().mean((1, 2))
    assert (moved > 5).all() and len(new["x"].unique(dim=0)) > 4 * 1257 - 5


def test_fingerprint_depends_on_all_contents():
    d = data.digits(8)
    make = lambda **kw: data.Dataset(
        **({"name": "a", "images": d.images, "labels": d.labels,
            "conditions": d.conditions, "splits": d.splits} | kw))
    swapped = {**d.splits, "val": d.splits["test"], "test": d.splits["val"]}
    other = [
        make(images=255 - d.images),
        make(labels=d.labels.flip(1)),
        make(conditions=[Classes("shape", 10)]),
        make(splits=swapped),
    ]
    assert len({d.sha256, *(o.sha256 for o in other)}) == 5
    assert make().sha256 == d.sha256
    assert len(repr(d)) < 200 and "<table>" in d._repr_html_()


@pytest.mark.parametrize(
    "change", [{"images": torch.zeros(4, 1, 2, 2)},
               {"images": torch.zeros(4, 2, 2, dtype=torch.uint8)},
               {"labels": torch.zeros(4, 2)},
               {"labels": torch.full((4, 1), torch.nan)},
               {"conditions": Schema([Code("u")])},
               {"splits": {"train": torch.tensor([0, 1]), "val": torch.tensor([1]),
                           "test": torch.tensor([2])}},
               {"splits": {"train": torch.tensor([0, 4]), "val": torch.tensor([1]),
                           "test": torch.tensor([2])}},
               {"splits": {"train": torch.tensor([], dtype=torch.long),
                           "val": torch.tensor([1]), "test": torch.tensor([2])}},
               {"splits": {"train": torch.tensor([0])}}])
def test_dataset_refuses(change):
    parts = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]),
             "test": torch.tensor([3])}
    good = {"name": "a", "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
            "labels": torch.zeros(4, 1),
            "conditions": Schema([Binary("b")]), "splits": parts}
    data.Dataset(**good)
    with pytest.raises(ValueError, match="accepted"):
        data.Dataset(**(good | change))


def test_wrong_sizes_and_names():
    for call in (lambda: data.digits(17), lambda: data.mnist(30),
                 lambda: data.digits(8, -1), lambda: data.digits(8, 1.5),
                 lambda: data.digits(8).table("training")):
        with pytest.raises(ValueError, match="accepted"):
            call()
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        data.load("mnits")
    assert (data.load("digits", 8).shape == (1, 8, 8)
            and data.load("digits").shape == (1, 16, 16))


def test_drawn_faces_are_kept_and_drawn_again_if_damaged(tmp_path, monkeypatch):
    """Three parts, everyone in each; the second time no picture is drawn; a damaged
    file is as good as none.
    """
    count, render = [], data.render_bytes
    monkeypatch.setattr(data, "render_bytes", lambda *a: count.append(a) or render(*a))
    monkeypatch.setattr(data.inspect, "getsourcefile", lambda _: faces.__file__)
    d = data.faces(size=16, n=60, identities=3, columns=["glasses", "identity", "yaw"])
    assert (list(d.conditions.names) == ["identity", "yaw", "glasses"]
            and d.shape == (3, 16, 16))
    assert ([len(d.indices(s)) for s in data.SPLITS] == [48, 6, 6]
            and d.conditions[0].n == 3)
    images, factors = faces.sample_faces(60, 16, 3)
    assert torch.equal(d.images, images)
    packed, _ = faces.labels_from_factors(factors, d.conditions.names, 3)
    assert torch.equal(d.labels, packed)
    (kept,) = (tmp_path / "cache" / "condgen" / "faces").iterdir()
    again = lambda: data.faces(size=16, n=60, identities=3,
                               columns=["glasses", "identity",
                                        "yaw"]).sha256 == d.sha256
    assert again() and len(count) == 1
    for harm in (lambda raw: raw[:-100], lambda raw: b"",
                 lambda raw: raw.replace(b"images", b"amiges"),
                 lambda raw: raw[:2000] + b"\xff" + raw[2001:]):
        kept.write_bytes(harm(kept.read_bytes()))
        assert again()
    assert len(count) == 5
    monkeypatch.setattr(data.np, "savez",
                        lambda file, **_: file.write(b"half") and 1 / 0)
    kept.unlink()
    with pytest.raises(ZeroDivisionError):
        again()
    assert not [*kept.parent.iterdir()]  # nothing half written stays behind
    monkeypatch.undo()
    kept.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert again()


@pytest.mark.parametrize(("given", "said"), [
    ({"size": 8}, "size=8; accepted: 16 to 256"), ({"size": 16.0}, "size=16.0"),
    ({"n": 0}, "n=0"), ({"identities": 257}, "257; accepted: 1 to 256"),
    ({"columns": ["glases"]}, "did you mean 'glasses'")])
def test_drawn_faces_refuse(given, said):
    with pytest.raises(ValueError, match=said):
        data.faces(**{"n": 2, "size": 16, **given})


@pytest.mark.skipif(not MNIST.exists(), reason="no MNIST in $CONDGEN_DATA")
def test_mnist():
    d = data.mnist(root=MNIST.parents[1])
    assert d.sha256.startswith("1cba8a27017a") and d.shape == (1, 32, 32)
    assert [len(d.splits[s]) for s in data.SPLITS] == [50_000, 10_000, 10_000]
    assert d.images[:, :, :2].sum() == 0 and d.images[0, 0, 2:30, 2:30].any()


def small_mnist(folder: Path, kind: int = 8) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(
            struct.pack(">BBBBIII", 0, 0, kind, 3, n, 28, 28) + bytes(n * 784), 1))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">BBBBI", 0, 0, kind, 1, n) + bytes(n))
        )


def test_mnist_reads_idx(tmp_path, monkeypatch):
    small_mnist(tmp_path / "here")
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path / "here"))
    before = sorted((tmp_path / "here").rglob("*"))
    d = data.mnist(28)
    assert (d.shape == (1, 28, 28)
            and d.splits["test"].equal(torch.arange(60_000, 70_000)))
    assert torch.cat([d.splits["train"], d.splits["val"]]).sort().values.equal(
        torch.arange(60_000))
    assert sorted((tmp_path / "here").rglob("*")) == before
    (tmp_path / "here/MNIST/raw/t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(ValueError, match="t10k-images.*damaged"):
        data.mnist()


def test_missing_mnist_error_names_the_folders_searched(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "MNIST",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FileNotFoundError,
                       match=r"data.*cache.*cannot be downloaded.*CONDGEN_DATA"):
        data.mnist()


# your own images ----------------------------------------------------------------------


@pytest.mark.parametrize(("values", "condition"), [
    ((0, 1, 1, 0), Binary("a")), ((0, 1, 2, 7), Classes("a", 8)),
    (("x", "y", "x", "z"), Classes("a", 3, ("x", "y", "z"))),
    ((0.5, 1, 2, 3), Real("a", 0.5, 3)),
    ((1, 30, 7, 5), Real("a", 1, 30)), ((-1, 1, 1, -1), Real("a", -1, 1))])
def test_inferred_conditions(tmp_path, values, condition):
    d = data.folder(squares(tmp_path / "a.zip", column("a", *values)), size=8)
    assert d.conditions == Schema([condition])
    back = d.conditions.unpack(d.labels)["a"]
    want = torch.tensor([sorted(set(values)).index(v) if isinstance(v, str) else v
                         for v in values], dtype=torch.float)
    assert torch.allclose(back.float(), want, atol=1e-5)
    assert d.values == ({"a": ("x", "y", "z")} if "x" in values else {})


def test_names_become_identifiers(tmp_path):
    table = "file,5 o'clock,class,m²\n" + "\n".join(f"{i}.png,{i % 2},{i % 3},{i / 4}"
                                                   for i in range(10))
    assert data.folder(squares(tmp_path / "a.zip", table),
                       size=4).conditions.names == ["_5_o_clock", "class_", "m_"]
    with pytest.raises(ValueError, match="labels.csv.*'a b' and 'a_b'.*rename"):
        data.folder(squares(tmp_path / "a.zip", "file,a b,a_b\n0.png,1,0\n"))


def test_columns_named_like_arguments_are_refused(tmp_path):
    path = squares(tmp_path / "a.zip", column("seed", 0, 1, 1))
    with pytest.raises(ValueError, match=r"labels.csv.*'seed'.*model, n,.*'seed_'"):
        data.folder(path)
    assert data.folder(path, size=4, columns=[]).conditions == Schema()


def test_schema_columns_and_splits(tmp_path):
    table = "file,split,a,b\n" + "\n".join(
        f"{i}.png,{('train', 'val', 'test')[i % 3]},{i % 2},{i % 4}" for i in range(10)
    )
    path = squares(tmp_path / "a.zip", table)
    d = data.folder(path, size=8, conditions=Real("b", 0, 9))
    assert (d.conditions == Schema([Real("b", 0, 9)])
            and d.splits["val"].tolist() == [1, 4, 7])
    assert data.folder(path, size=8, columns=["b"]).conditions == Schema([
        Classes("b", 4)])
    assert data.folder(path, size=8, columns=[]).conditions == Schema()
    with pytest.raises(ValueError, match="no column 'bb'.*did you mean 'b'"):
        data.folder(path, columns=["bb"])
    with pytest.raises(ValueError, match="'smiling'.*accepted: a, b"):
        data.folder(path, conditions=Binary("smiling"))
    with pytest.raises(ValueError, match=r"'2\.png'.*b=2"):
        data.folder(path, conditions=Binary("b"))
    (tmp_path / "l.csv").write_text(table.replace("val", "valid"))
    with pytest.raises(ValueError, match="'valid'.*did you mean 'val'"):
        data.folder(path, tmp_path / "l.csv")


def test_folder_and_zip_are_the_same(tmp_path):
    table = column("a", *(i % 2 for i in range(10)))
    path = squares(tmp_path / "a.zip", table)
    with zipfile.ZipFile(path) as z:
        z.extractall(tmp_path / "a")
    one, two = data.folder(path, size=8), data.folder(tmp_path / "a", size=8)
    assert one.sha256 == two.sha256 and one.name == two.name == "a"
    assert [len(one.splits[s]) for s in data.SPLITS] == [6, 2, 2]
    (tmp_path / "a/labels.csv").unlink()
    assert data.folder(tmp_path / "a", size=8).conditions == Schema()


def test_parts_are_assigned_once_for_all_images(tmp_path, monkeypatch):
    """Once for each image, 50,000 images took hours."""
    calls, assign = [], folders.assign_splits
    monkeypatch.setattr(folders, "assign_splits",
                        lambda names: calls.append(names) or assign(names))
    data.folder(archive(tmp_path / "a.zip", {f"{i}.png": picture() for i in range(5)}))
    assert len(calls) == 1


def test_many_images_are_read_with_a_bar(tmp_path, monkeypatch, capsys):
    from tqdm import auto

    monkeypatch.setattr(auto, "tqdm", lambda names, text, **kw: print(text) or names)
    data.folder(archive(tmp_path / "a.zip", {"0.png": picture()}), size=2)
    assert capsys.readouterr().out == "reading a.zip\n"


def test_parts_depend_on_names_only():
    names = [f"{i}.png" for i in range(100)]
    assert folders.assign_splits(names) == folders.assign_splits(names[::-1])
    assert [list(folders.assign_splits(names).values()).count(s)
            for s in data.SPLITS] == [80, 10, 10]
    assert set(folders.assign_splits(["a", "b"]).values()) == {"train"}


def test_modes_and_crop(tmp_path):
    grey = {"a.png": picture("L"), "b.png": picture("I;16", color=51200),
            "c.jpg": picture("L", kind="JPEG")}
    d = data.folder(archive(tmp_path / "g.zip", grey), size=8)
    assert d.shape == (1, 8, 8) and ((d.images.int() - 200).abs() <= 1).all()
    mixed = {**grey, "d.png": picture("RGBA", color=(1, 2, 3, 255)),
             "e.gif": picture("P", color=0, kind="GIF")}
    assert data.folder(archive(tmp_path / "m.zip", mixed), size=8).shape == (3, 8, 8)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    assert (data.folder(archive(tmp_path / "w.zip", {"w.png": stream.getvalue()}),
                        size=None).images == 255).all()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA", "PCX", "DDS"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, monkeypatch, kind):
    """By contents, and without a call of their reader."""
    raw, opened = picture(kind=kind), []
    for plugin in set(Image.OPEN) - set(map(str.upper, image_files.IMAGE_FORMATS)):
        monkeypatch.setitem(Image.OPEN, plugin, (lambda *_: opened.append(1), None))
    path = archive(tmp_path / "a.zip", {"0.png": raw})
    with pytest.raises(ValueError, match="'0.png' is not an image.*accepted: files in "
                                         "PNG, JPEG, WebP, BMP, GIF, TIFF format"):
        data.folder(path)
    assert not opened


@pytest.mark.parametrize("kind", image_files.IMAGE_FORMATS)
def test_contents_decide_and_not_the_name(tmp_path, kind):
    path = archive(tmp_path / "a.zip", {"0.gif": picture(kind=kind)})
    found = data.folder(path, size=4).images.float().mean((0, 2, 3))
    assert torch.allclose(found, torch.tensor([200.0, 50.0, 10.0]), atol=3)


def test_the_first_image_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:],
                       **{"lossless": True} if kind == "WEBP" else {})
        found = data.folder(archive(tmp_path / "a.zip", {"a.png": stream.getvalue()}),
                            size=2).images
        assert found[0, :, 0, 0].tolist() == [255, 0, 0]


def grey(values: np.ndarray, kind: str, tags: dict | None = None,
         mode: str | None = None) -> torch.Tensor:
    """What is read of a grey image with these values."""
    stream = io.BytesIO()
    im = Image.fromarray(values) if mode is None else Image.frombytes(
        mode, values.shape[::-1], values.tobytes())
    im.save(stream, kind, **({"tiffinfo": tags} if tags else {}))
    square, is_grey = image_files.read_square_image(stream.getvalue(), "a.tif", None)
    assert is_grey
    return torch.from_numpy(square[..., 0].copy()).long()


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(("values", "kind", "options"), [
    (RAMP * 257, "PNG", {}), (RAMP * 257, "TIFF", {}),
    ((RAMP * 257).astype(">u2"), "TIFF", {"mode": "I;16B"}),
    (RAMP[::-1, ::-1] * 257, "TIFF", {"tags": {262: 0}})])
def test_sixteen_bits_become_eight(values, kind, options):
    values = values if options.get("mode") else values.astype(np.uint16)
    assert torch.equal(grey(values, kind, **options), torch.from_numpy(RAMP))


def test_twelve_bits_become_eight():
    body = b"".join(struct.pack("<HHLL", *entry) for entry in (
        (256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1),
        (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, 1), (279, 4, 1, 3)))
    raw = b"II*\0\x0c\0\0\0\xff\xf8\x00\0" + struct.pack("<H", 8) + body + bytes(4)
    image = Image.open(io.BytesIO(raw))
    assert image.mode == "I;16" and np.asarray(image).tolist() == [[4095, 2048]]
    assert np.asarray(image_files.to_eight_bits(image)).tolist() == [[255, 128]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int16])
def test_values_without_a_range_are_refused(tmp_path, dtype):
    """Once they became black."""
    stream = io.BytesIO()
    if dtype is np.int16:
        Image.fromarray(RAMP.astype(np.uint16)).save(stream, "TIFF", tiffinfo={339: 2})
    else:
        Image.fromarray(RAMP.astype(dtype)).save(stream, "TIFF")
    path = archive(tmp_path / "a.zip", {"0.tif": stream.getvalue()})
    with pytest.raises(ValueError, match="'0.tif'.*no defined range; accepted: 8 or 16"):
        data.folder(path)


def test_orientation_is_applied_once(tmp_path):
    im = Image.new("RGB", (8, 8), "black")
    im.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        stream = io.BytesIO()
        im.save(stream, kind, exif=exif.tobytes())
        found, _ = image_files.read_square_image(stream.getvalue(), "a", None)
        assert found[:, 5:].min() > 200 and found[:, :3].max() < 50, kind


@pytest.mark.parametrize("raw", [
    b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHLL", 273, 4, 70_000, 8),
    b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\1" + bytes(7)
    + struct.pack("<HHQQ", 324, 4, 70_000, 8),
    b"Exif\0\0MM\0*\0\0\0\x08\0\1" + struct.pack(">HHLL", 34665, 4, 1, 0x1a)
    + bytes(4) + b"\0\1" + struct.pack(">HHLL", 37500, 5, 70_000, 8),
    b"\xff\xd8" + b"\xff\xe5\0\2" * 70_000, b"\xff\xd8" + b"\xff" * 140_000,
    b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * 65,
    b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0abCdabcd" * 70_000])
def test_files_with_too_many_parts_are_refused(raw):
    with pytest.raises(ValueError, match="too many parts, accepted: 65,536"):
        image_files.check_parts(raw)
    image_files.check_parts(raw[:14])


@pytest.mark.parametrize(("name", "bad"), [
    ("../a.png", "with .."), ("b/../../a.png", "with .."), ("/a.png", "absolute"),
    ("C:\\a.png", "absolute"), ("..\\a.png", "with ..")])
def test_unsafe_names(tmp_path, name, bad):
    with pytest.raises(ValueError, match=bad):
        data.folder(archive(tmp_path / "a.zip", {"ok.png": picture(), name: picture()}))
    (tmp_path / "f").mkdir()
    (tmp_path / "f/ok.png").write_bytes(picture())
    (tmp_path / "f/labels.csv").write_text(f"file\n{name}\n")
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(ValueError, match="missing"):
        data.folder(tmp_path / "f")


def test_the_root_of_all_files_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rglob", lambda *a: pytest.fail("it is searched"))
    (tmp_path / "link").symlink_to("/")
    for path in ("/", tmp_path / "link"):
        with pytest.raises(ValueError, match="accepted: a folder of images"):
            data.load(str(path))


def test_files_that_may_not_be_read_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "f" / name).write_bytes(picture())
    seen = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: seen(path, **k)
                        if "b.png" not in str(path) else no_entry(path))
    assert len(data.folder(tmp_path / "f").images) == 1


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", no_entry)
    with pytest.raises(PermissionError, match="Permission denied"):
        data.folder(tmp_path)


def no_entry(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_member_without_a_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr(zipfile.ZipInfo(""), picture())
    with pytest.raises(ValueError, match="a.zip: member '' is without a name"):
        data.folder(tmp_path / "a.zip")


@pytest.mark.parametrize("size", [0, 4097, 8.0, "8", True])
def test_sizes_of_own_images_are_refused(tmp_path, size):
    path = archive(tmp_path / "a.zip", {"a.png": picture()})
    with pytest.raises(ValueError, match="size=.*; accepted"):
        data.folder(path, size=size)
    assert data.folder(path, size=np.int64(8)).shape[1:] == (8, 8)
    wide = archive(tmp_path / "b.zip", {"b.png": picture("L", (4097, 4097))})
    with pytest.raises(ValueError, match="'b.png': size=4097; accepted"):
        data.folder(wide, size=None)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(folders.np, "empty", full)
    with pytest.raises(ValueError, match="a.zip: 1 images of 9 × 9 .*smaller size"):
        data.folder(archive(tmp_path / "a.zip", {"a.png": picture()}), size=9)


def test_links_and_bombs(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as z:
        z.writestr(link, "target")
    with pytest.raises(ValueError, match="'link.png' is a link"):
        data.folder(tmp_path / "l.zip")
    bomb = archive(tmp_path / "b.zip", {"bomb.png": bytes(folders.MAX_FILE_BYTES + 1)})
    assert bomb.stat().st_size < 200_000
    with pytest.raises(ValueError, match="'bomb.png' is 64 MB large"):
        data.folder(bomb)
    # a member that lies about its size in both headers
    raw = bytearray(bomb.read_bytes())
    for at in (22, raw.rindex(b"PK\x01\x02") + 24):
        raw[at : at + 4] = struct.pack("<I", 100)
    bomb.write_bytes(raw)
    with pytest.raises(ValueError, match="bomb.png"):
        data.folder(bomb)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="'a.png'.*12 × 9 pixels"):
        data.folder(archive(tmp_path / "p.zip", {"a.png": picture()}))


@pytest.mark.parametrize(("table", "message"), [
    ("", "no column 'file'"), ("file,a\n", "no rows"),
    ("fil,a\n0.png,1\n", "no column 'file'"),
    ("file,a,a\n0.png,1,2\n", "'a' is there twice"),
    (column("a", "") , "'0.png' is ''"), (column("a", 1, "nan"), "'1.png' is 'nan'"),
    (column("a", 2, "inf"), "'1.png' is 'inf'"),
    (column("a", 1.5, 1.5), "labels.csv: .*1.5' only"),
    (column("split", "val", "test"), "labels.csv: no image is in the split 'train'"),
    (column("a", -1e308, 1e308), "labels.csv: a: from -1e.308 to 1e.308"),
    (column("a" * 101, 1), "labels.csv.*a name of 101 characters"),
    (column("a", "x" * 2**20), "labels.csv.*a row of over 1,048,576 characters"),
    ("file," + ",".join(map(str, range(1000))), "labels.csv has 1,001 columns; accepted"),
    ("file,a\n0.png,1,2\n", "row 1 has 3"),
    ("file,a\n0.png,1\n0.png,0\n", "'0.png' is there 2 times"),
    (b"file\n\xff\xfe", "UTF-8"), ("file,a\n0.png,1\n777.png,1\n778.png,1\n",
                                   r"2 files are missing, the first is '777.png'"),
    ("file\n" + "\n".join(f"{i}.png" for i in range(10)) + "\n", None),
    ("file,a\n\"0.png,1\n", "CSV"),
    ("file,a\n" + "\n".join(f"{i}.png,text{i}" for i in range(101)),
     "101 different texts")])
def test_tables(tmp_path, table, message):
    path = squares(tmp_path / "a.zip", table, n=101)
    if message is None:
        assert data.folder(path, size=2).conditions == Schema()
        return
    with pytest.raises(ValueError, match=message):
        data.folder(path, size=2)


def test_a_list_of_fractions_is_not_taken_for_probabilities(tmp_path):
    path = squares(tmp_path / "a.zip", column("a", 0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="labels.csv: '0.png': a=0.5; accepted"):
        data.folder(path, conditions=Classes("a", 3))


def test_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"'b.png' is not an image"):
        data.folder(archive(tmp_path / "a.zip",
                            {"a.png": picture(), "b.png": picture()[:40]}))
    raw = bytearray(
        archive(tmp_path / "c.zip", {"c.png": os.urandom(500)}).read_bytes())
    raw[100] ^= 255
    (tmp_path / "c.zip").write_bytes(raw)
    with pytest.raises(ValueError, match=r"'c.png' cannot be read"):
        data.folder(tmp_path / "c.zip")
    (tmp_path / "n.zip").write_text("not a zip")
    for path, error in (
        (tmp_path / "n.zip", ValueError),
        (tmp_path / "none", FileNotFoundError),
        (archive(tmp_path / "e.zip", {}), ValueError),
    ):
        with pytest.raises(error):
            data.folder(path)
    with pytest.raises(FileNotFoundError, match="l.csv"):
        data.folder(archive(tmp_path / "a.zip", {"a.png": picture()}),
                    tmp_path / "l.csv")
    with (
        pytest.raises(ValueError, match="twice"),
        pytest.warns(UserWarning),
        zipfile.ZipFile(tmp_path / "d.zip", "w") as z,
    ):
        z.writestr("a.png", picture()), z.writestr("a.png", picture()), z.close()
        data.folder(tmp_path / "d.zip")


# prepared sets ------------------------------------------------------------------------


def put(path: Path, raw: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)


def test_celeba(tmp_path):
    src, files = tmp_path / "official", [f"{i:06}.jpg" for i in range(1, 5)]
    for f in files:
        put(src / "Img/img_align_celeba" / f, picture(size=(178, 218), kind="JPEG"))
    put(
        src / "Anno/list_attr_celeba.txt", "4\n5_o_Clock_Shadow Smiling \n" + "".join(
            f"{f} {'-1 ' if i % 2 else ' 1 '} 1\n" for i, f in enumerate(files)),
    )
    put(src / "Anno/identity_CelebA.txt",
        "".join(f"{f} {i // 2 + 7}\n" for i, f in enumerate(files)))
    put(src / "Eval/list_eval_partition.txt",
        "".join(f"{f} {max(0, i - 1)}\n" for i, f in enumerate(files)))
    assert downloads.prepare("celeba", src) == folders.data_folder() / "celeba64"
    d = data.load("celeba64")
    assert (d.conditions == Schema([Binary("_5_o_Clock_Shadow"), Binary("Smiling")])
            and d.shape == (3, 64, 64))
    assert (d.labels.tolist() == [[1, 1], [0, 1], [1, 1], [0, 1]]
            and d.splits["train"].tolist() == [0, 1])
    assert data.prepared("celeba64", columns=["identity"]).conditions == Schema([
        Classes("identity", 9)])
    (src / "Anno/identity_CelebA.txt").unlink()
    with pytest.raises(FileNotFoundError, match="identity_CelebA.txt"):
        downloads.prepare("celeba", src)


def test_lfw(tmp_path):
    for k in range(12):
        for i in (1, 2):
            put(tmp_path / f"lfw/lfw_funneled/A_{k}/A_{k}_{i:04}.jpg",
                picture(size=(250, 250), kind="JPEG"))
    downloads.prepare("lfw", tmp_path / "lfw", size=16)
    d = data.prepared("lfw16", columns=["identity"])
    who = d.conditions.unpack(d.labels)["identity"]
    assert d.shape == (3, 16, 16) and d.conditions == Schema([Classes("identity", 12)])
    parts = [set(who[d.splits[s]].tolist()) for s in data.SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert data.load("lfw16", 8).conditions == Schema()


def test_utkface(tmp_path):
    for i, age in enumerate([1, 26, 116, 40]):
        put(tmp_path / f"u/part{i % 2}/{age}_{i % 2}_{i}_2017.jpg.chip.jpg",
            picture(size=(200, 200), kind="JPEG"))
    put(tmp_path / "u/61_1_20170109.jpg", picture(kind="JPEG"))
    with pytest.warns(UserWarning, match="1 files have no labels.*61_1_2017"):
        downloads.prepare("utkface", tmp_path / "u", tmp_path / "data", 8)
    d = data.load("utkface8")
    assert d.conditions == Schema([Real("age", 1, 116), Binary("gender"),
                                   Classes("race", 4)])


def lfw_download(folder: Path, n: int = 3) -> Path:
    for i in range(n):
        put(folder / f"A_B/A_B_{i:04}.jpg", picture(size=(250, 250), kind="JPEG"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}


def test_prepare_refuses(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'celeba'"):
        downloads.prepare("celebA", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        downloads.prepare("lfw", tmp_path / "none")
    with pytest.raises(ValueError, match="no images"):
        downloads.prepare("lfw", tmp_path, tmp_path / "new" / "out")
    assert not [*tmp_path.iterdir()]
    for size in (0, 4097):
        with pytest.raises(ValueError, match=f"size={size}; accepted: "):
            downloads.prepare("lfw", lfw_download(tmp_path / "lfw"), size=size)
    lfw_download(tmp_path / "lfw" / "twice")
    with pytest.raises(ValueError, match="'A_B_0000.jpg' twice"):
        downloads.prepare("lfw", tmp_path / "lfw")
    with pytest.raises(FileNotFoundError, match="no prepared set 'lfw64'"):
        data.prepared("lfw64")
    assert not folders.data_folder().exists() or not contents(folders.data_folder())


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError(28, "No space left"),
                                     ValueError("damaged")])
@pytest.mark.parametrize("place", ["read_square_image", "write_atomically"])
def test_stopped_prepare_changes_nothing(tmp_path, monkeypatch, place, trouble, before):
    source, out = lfw_download(tmp_path / "lfw"), tmp_path / "out"
    if before:
        downloads.prepare("lfw", source, out)
    old, count, work = contents(tmp_path), [], getattr(downloads, place)

    def stop(*given):
        count.append(1)
        if len(count) == (2 if place == "read_square_image" else 1):
            raise trouble
        return work(*given)

    monkeypatch.setattr(downloads, place, stop)
    with pytest.raises(type(trouble) if isinstance(trouble, Exception) else trouble):
        downloads.prepare("lfw", source, out)
    assert contents(tmp_path) == old and count
    assert (out / "lfw64").exists() == before


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    """Written pieces are flushed; an error of another file keeps its name."""
    path = tmp_path / "a.zip"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="none"), files.atomic_file(path):
        (tmp_path / "none").read_bytes()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*a.zip: No space left on device"):
        files.write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.zip": b"old"}


@pytest.mark.parametrize("harm", [
    lambda text: text.replace("1.jpg 7", "7.jpg 7"),
    lambda text: text.replace("1.jpg 0", "1.jpg 9"),
    lambda text: text.replace("1.jpg 1 1", "1.jpg 1")])
def test_celeba_tables_that_do_not_agree(tmp_path, harm):
    put(tmp_path / "img_align_celeba/1.jpg", picture(kind="JPEG"))
    for name, text in (("list_attr_celeba", "1\nHat Smiling\n1.jpg 1 1\n"),
                       ("identity_CelebA", "1.jpg 7\n"),
                       ("list_eval_partition", "1.jpg 0\n")):
        put(tmp_path / f"{name}.txt", harm(text))
    with pytest.raises(ValueError, match="list_attr_celeba.txt.* do not agree on '1.jpg'"):
        downloads.prepare("celeba", tmp_path)


def test_without_a_home_folder_nothing_is_kept(tmp_path, monkeypatch):
    """As in a container whose user is not in the list of users."""
    import pwd

    import torchvision

    def unknown(_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "CONDGEN_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(torchvision.datasets, "MNIST", pytest.fail)
    assert folders.cache_folder() is folders.data_folder() is None
    assert folders.prepared_names() == []
    assert data.faces(16, 5, 2).images.shape == (5, 3, 16, 16)
    for call in (data.mnist, lambda: data.load("lfw64"), lambda: data.prepared("lfw64"),
                 lambda: downloads.prepare("lfw", lfw_download(tmp_path / "lfw"))):
        with pytest.raises((ValueError, OSError), match="CONDGEN_DATA, which is not set"):
            call()
    monkeypatch.setenv("CONDGEN_DATA", "~/data")
    with pytest.raises(ValueError, match="CONDGEN_DATA is '~/data'.*accepted"):
        folders.data_folder()


def test_drawn_sets_are_known_by_how_they_were_drawn():
    """Rounding differs between processors; other factors or another drawing count."""
    from condgen import data as module
    from condgen.data import portraits

    one = portraits(size=16, n=60, identities=3)
    other = replace(one, images=one.images.clamp(max=254))
    assert other.sha256 == one.sha256 != replace(one, drawn="").sha256
    assert portraits(size=16, n=60, identities=4).sha256 != one.sha256
    assert replace(one, drawn=one.drawn.replace("drawing 1", "drawing 2")).sha256 != one.sha256
    assert f"drawing {module.DRAWING}" in one.drawn
