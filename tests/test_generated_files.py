"""Generated archives, images and tables: each is read, or refused by a message that
names the file.

`CONDGEN_GENERATED=1000` runs so many random inputs of each kind.
"""

import io
import os
import resource
import stat
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from condgen import data, folders
from condgen.conditions import RESERVED_NAMES, Binary, Classes, Real

MANY = int(os.environ.get("CONDGEN_GENERATED", 0))
laws = settings(max_examples=MANY or 60, derandomize=not MANY, database=None,
                deadline=None, print_blob=False,
                suppress_health_check=list(HealthCheck))
GIGABYTE = 2**30
SECONDS = 10  # of the processor, so that other programs do not matter
SIZE = 4


def memory() -> int:
    """The largest memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read(path: Path, *names: str, **options) -> data.Dataset | None:
    """The data set, held to its laws, or None if it is refused by name."""
    begun, before = time.process_time(), memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = data.folder(path, size=SIZE, **options)
    except (ValueError, OSError) as error:
        said = str(error)
        assert any(name and (name in said or repr(name)[1:-1] in said)
                   for name in (path.name, "labels.csv", *names)), said
        assert len(said) < 2000, len(said)
        return None
    finally:
        assert memory() - before < GIGABYTE
        assert time.process_time() - begun < SECONDS
    n = len(d.images)
    assert d.images.shape in ((n, 1, SIZE, SIZE), (n, 3, SIZE, SIZE)) and n > 0
    assert sorted(torch.cat(list(d.splits.values())).tolist()) == list(range(n))
    assert torch.isfinite(d.labels).all() and len(d.sha256) == 64
    back = d.conditions.pack(n, **d.conditions.unpack(d.labels))
    assert torch.allclose(back, d.labels, atol=1e-5)
    return d


# images -------------------------------------------------------------------------------


def encoded(im: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    im.save(stream, kind, **options)
    return stream.getvalue()


def pattern(mode: str, w: int, h: int) -> Image.Image:
    """An image of ascending values in any mode."""
    values = np.arange(w * h, dtype=np.uint32).reshape(h, w)
    if mode == "I;16":
        return Image.fromarray((values * 977 % 65536).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((values * 97).astype(np.int32))
    if mode == "F":
        return Image.fromarray((values / max(1, w * h)).astype(np.float32))
    return Image.fromarray((values % 256).astype(np.uint8)).convert("RGB").convert(
        mode) if mode != "LAB" else Image.new("LAB", (w, h), (50, 20, 20))


WRITES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "PPM": ("L", "RGB"), "ICO": ("RGBA",), "PCX": ("L", "RGB"), "TGA": ("RGB",),
    "DDS": ("RGB",), "EPS": ("RGB",), "PDF": ("RGB",), "SGI": ("RGB",),
    "JPEG2000": ("RGB",), "MSP": ("1",), "ICNS": ("RGBA",),
}


@cache
def plain(kind: str, mode: str, w: int, h: int, orientation: int, frames: int) -> bytes:
    """An undamaged file, in a format that is accepted or another one."""
    im, options = pattern(mode, w, h), {}
    if orientation and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif.tobytes()
    if frames > 1 and kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options |= {"save_all": True, "append_images": [im] * (frames - 1)}
    try:
        return encoded(im, kind, **options)
    except (OSError, KeyError, ValueError):  # this Pillow does not write it
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    return (struct.pack(">L", len(body)) + kind + body
            + struct.pack(">L", zlib.crc32(kind + body)))


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    """A TIFF file of one directory at byte 8, and what follows it."""
    body = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + tail


def declared(kind: str, w: int, h: int) -> bytes:
    """A file that says how large it is and holds next to nothing."""
    if kind == "PNG":
        head = struct.pack(">LLBBBBB", w, h, 8, 2, 0, 0, 0)
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    if kind == "BMP":
        raw = bytearray(plain("BMP", "RGB", 2, 2, 0, 1))
        raw[18:26] = struct.pack("<ll", w % 2**31, h % 2**31)
        return bytes(raw)
    if kind == "GIF":
        raw = bytearray(plain("GIF", "L", 2, 2, 0, 1))
        raw[6:10] = struct.pack("<HH", w % 65536, h % 65536)
        return bytes(raw)
    if kind == "WEBP":
        head = b"\x10\0\0\0" + struct.pack("<L", w % 2**24)[:3] + struct.pack(
            "<L", h % 2**24)[:3]
        return b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0" + head + bytes(8)
    if kind == "JPEG":
        raw = bytearray(plain("JPEG", "L", 8, 8, 0, 1))
        at = raw.index(b"\xff\xc0") + 5
        raw[at : at + 4] = struct.pack(">HH", h % 65536, w % 65536)
        return bytes(raw)
    return tiff((256, 4, 1, w), (257, 4, 1, h), (258, 3, 1, 8), (259, 3, 1, 1),
                (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, h), (279, 4, 1, 9))


@st.composite
def harmed(draw, whole: bytes) -> bytes:
    """Truncated, with changed or inserted bytes, or followed by others."""
    raw, kind = bytearray(whole), draw(st.sampled_from("cut flip insert add".split()))
    if kind == "cut":
        return bytes(raw[: draw(st.integers(0, len(raw)))])
    if kind == "add":
        return bytes(raw) + draw(st.binary(max_size=40))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        new = draw(st.binary(min_size=1, max_size=4))
        raw[at : at + (len(new) if kind == "flip" else 0)] = new
    return bytes(raw)


@st.composite
def image_files(draw) -> bytes:
    how = draw(st.sampled_from(["plain", "harmed", "harmed", "declared", "other"]))
    if how == "declared":
        sides = st.sampled_from([0, 1, 3, 8191, 8192, 16384, 65535, 2**24 - 1, 2**31 - 1])
        return declared(draw(st.sampled_from(["PNG", "BMP", "GIF", "WEBP", "JPEG",
                                              "TIFF"])), draw(sides), draw(sides))
    if how == "other":
        return draw(st.one_of(st.binary(max_size=60), st.sampled_from([
            b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\3\4",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"])))
    kind = draw(st.sampled_from(sorted(WRITES)))
    raw = plain(kind, draw(st.sampled_from(WRITES[kind])), draw(st.integers(1, 9)),
                draw(st.integers(1, 9)), draw(st.integers(0, 9)),
                draw(st.integers(1, 2)))
    return draw(harmed(raw)) if how == "harmed" else raw


def strips(n: int) -> bytes:
    """A TIFF file of `n` strips of one pixel, all of them the same byte."""
    return tiff((256, 4, 1, 1), (257, 4, 1, n), (258, 3, 1, 8), (259, 3, 1, 1),
                (262, 3, 1, 1), (273, 4, n, 110), (277, 3, 1, 1), (278, 4, 1, 1),
                tail=struct.pack("<L", 8) * n)


def scans(side: int, n: int) -> bytes:
    """A progressive JPEG whose last scan is there `n` times more."""
    raw = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    return raw[:-2] + raw[raw.rindex(b"\xff\xda") : -2] * n + raw[-2:]


@laws
@given(st.lists(image_files(), min_size=1, max_size=3))
@example([strips(3_000_000)])
@example([scans(1000, 20_000)])
def test_any_image_is_read_or_refused(files):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "portfolio")
        folder.mkdir()
        for i, raw in enumerate(files):
            (folder / f"{i}.png").write_bytes(raw)
        read(folder, *(f"{i}.png" for i in range(len(files))))


# archives -----------------------------------------------------------------------------

GOOD = encoded(Image.new("RGB", (3, 2), (200, 50, 10)), "PNG")
MEMBERS = st.one_of(
    st.sampled_from(["0.png", "1.png", "a/b/c/2.png", "/etc/0.png", "../0.png", "..",
                     "a/../../0.png", "C:\\0.png", "..\\0.png", "", "a//0.png",
                     "./0.png", ".png", "0.png/", "labels.csv", "inner.zip",
                     "__MACOSX/._0.png", "ä.png", "\N{WATER WAVE}.png", "a\0b.png",
                     "x" * 300 + ".png", "con.png", " .png", "a\nb.png"]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).map(
        lambda text: f"{text}.png"))
CONTENTS = st.one_of(
    st.just(GOOD), st.just(GOOD), image_files(),
    st.sampled_from([b"", b"file,a\n0.png,1\n", bytes(5_000_000)]))


def mostly(*usual: object, odd: st.SearchStrategy) -> st.SearchStrategy:
    """Nine times in ten one of the usual values."""
    return st.integers(0, 9).flatmap(
        lambda k: st.sampled_from(usual) if k else odd)


@st.composite
def archives(draw) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as z:
        warnings.simplefilter("ignore")
        for i in range(draw(st.integers(0, 4))):
            member = zipfile.ZipInfo(draw(mostly(f"{i}.png", f"a/{i}.png",
                                                 odd=MEMBERS)))
            member.compress_type = draw(st.sampled_from([0, 8, 8, 12, 14]))
            kind = draw(mostly(0, stat.S_IFREG, odd=st.sampled_from([
                stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])))
            member.external_attr = (kind | 0o644) << 16
            z.writestr(member, draw(mostly(GOOD, odd=CONTENTS)))
        z.comment = draw(mostly(b"", odd=st.sampled_from([b"PK\5\6" * 9,
                                                          bytes(65535)])))
    raw = bytearray(stream.getvalue())
    for at in [i for i in range(len(raw)) if raw[i : i + 4] == b"PK\1\2"]:
        field = draw(mostly(None, odd=st.sampled_from(FIELDS)))
        if field:
            struct.pack_into(field[1], raw, at + field[0], field[2])
    return draw(harmed(bytes(raw))) if draw(st.integers(0, 3)) == 0 else bytes(raw)


# of a member in the central directory: flags (encrypted, UTF-8), method, checksum,
# sizes, lengths of its parts, kind, place
FIELDS = [(8, "<H", 1), (8, "<H", 0x800), (8, "<H", 0x41), (10, "<H", 9),
          (10, "<H", 99), (16, "<L", 1), (20, "<L", 2**32 - 1), (24, "<L", 2**32 - 1),
          (24, "<L", 2**31), (28, "<H", 65535), (30, "<H", 4), (38, "<L", 0xA1FF0000),
          (42, "<L", 2**31), (42, "<L", 0)]


@laws
@given(archives(), st.sampled_from([None, b"file\n0.png\n", b"file,a\n0.png,1\n"]))
def test_any_archive_is_read_or_refused(raw, table):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "images.zip")
        path.write_bytes(raw)
        if table is not None:
            Path(place, "labels.csv").write_bytes(table)
        read(path, *(f"{name}'" for name in ("png", "zip", "csv")))
        assert {p.name for p in Path(place).iterdir()} <= {"images.zip", "labels.csv"}


# tables -------------------------------------------------------------------------------

HEADS = st.one_of(st.sampled_from(["file", "split", "a", "b", "class", "", "5", "a b",
                                   "a_b", "m²", "File", "a\0", *RESERVED_NAMES]),
                  st.text(max_size=3))
CELLS = st.one_of(
    st.sampled_from(["0", "1", "2", "x", "nan", "", "1e999", "-3.5", '"', "a,b", '""',
                     "9" * 30, "train", "test", "0x1", "1e308", "-1e308", "5e-324",
                     "1_0", " 1 ", "inf", "-inf", "None", "\0", "0.5", "\N{BOM}",
                     "٣", "y" * 2000]), st.text(max_size=5))
ASKED = [None, None, None, [], [Classes("a", 3)], [Binary("a")], [Real("a", 0, 1)]]


@st.composite
def tables(draw) -> bytes:
    kinds = draw(st.lists(st.sampled_from(["0 1", "0 1 2 5", "x y z", "1.5 -3 20",
                                           "train test val"]), max_size=3))
    head = ["file", *(draw(mostly("split" if "val" in kind else "abc"[i], odd=HEADS))
                      for i, kind in enumerate(kinds))]
    rows = [[f"{i}.png", *(draw(st.sampled_from(kind.split())) for kind in kinds)]
            for i in range(draw(st.integers(0, 5)))]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.sampled_from([head, *rows]))
        at = draw(st.integers(0, len(row)))
        row[at : at + draw(mostly(1, odd=st.integers(0, 2)))] = [draw(CELLS)]
    line = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    code = draw(mostly("utf-8", "utf-8-sig", odd=st.sampled_from(["utf-16", "latin-1"])))
    text = line.join(",".join(row) for row in [head, *rows])
    return text.encode(code, "replace" if code == "latin-1" else "surrogatepass")


@laws
@given(st.one_of(tables(), st.binary(max_size=60)), st.sampled_from(ASKED),
       st.booleans())
@example(b"file,a\n0.png," + b"9" * 400 + b"\n1.png,1\n", [Classes("a", 3)], True)
@example(b"file" + b"".join(b",%d" % i for i in range(1_000_000)) + b"\n0.png"
         + b",1" * 1_000_000, None, True)
@example(b'file,a\n0.png,"' + b'",\n"' * 1_000_000 + b'"\n', None, False)
@example(b"file,a\n0.png,1\n" * 5_000_000, None, False)
def test_any_table_is_read_or_refused(raw, conditions, inside):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "portfolio")
        folder.mkdir()
        for i in range(5):
            (folder / f"{i}.png").write_bytes(GOOD)
        table = Path(folder if inside else place, "labels.csv")
        table.write_bytes(raw)
        read(folder, labels=None if inside else table, conditions=conditions)


@pytest.mark.skipif(sys.platform != "linux", reason="names and pipes of Linux")
def test_what_a_folder_holds_besides_images_is_left_out(tmp_path):
    """Folders named like images, pipes, loops of links, names that are not UTF-8."""
    (tmp_path / "d.png").mkdir()
    (tmp_path / "d.png/1.png").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "up").symlink_to(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(GOOD)
    assert len(read(tmp_path).images) == 2
    assert folders.FolderOrZip(tmp_path).images() == ["d.png/1.png", "\udcff.png"]
    assert read(tmp_path / "pipe.png") is None
