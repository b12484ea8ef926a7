"""Enlarging any photo with references: tiles, radius, matches, quality, files, command."""

import io
import re
import sys
from functools import cache

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import condgen as cg
from condgen import superres
from condgen.matching import enlarge_images, match_patches, reduce_images
from condgen.models.gated_transfer import GatedTransfer
from condgen.scenes import scene_pairs
from condgen.superres import (
    best_rows, patch_rows, read_photo, receptive_radius, tiles, upscale, upscale_file)

TOLERANCE = 1e-5  # of a tiled result
LOSS = 0.4  # dB that a wrong reference may cost; 0.28 when the weights were made


def little(blocks=1, sisr_blocks=2, scale=0.2):
    """A small model whose weights are large enough for a fault to be seen."""
    torch.manual_seed(0)
    model = GatedTransfer((3, 32, 32), 6, blocks, 6, sisr_blocks)
    for p in model.parameters():
        p.data.normal_(0, scale)
    model.slope.data.copy_(torch.tensor([4.0, 4.0, 2.0, 2.0, -4.0]))
    return model


def photos(seed, *sides):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *side, generator=g) for side in sides]


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


@cache
def scene_quality():
    """PSNR by reference, means over scenes that no training has seen."""
    kinds = ("shift", "same", "other", "noise")
    table = scene_pairs(96, 5, kinds, ("upscale", "test"))
    x, references = table["x"] / 255, table["reference"] / 255
    model, found = cg.load("gated-upscaler"), {}
    for k in range(0, len(x), len(kinds)):
        small = reduce_images(x[k:k + 1])[0]
        given = {kind: [references[k + i]] for i, kind in enumerate(kinds)}
        given |= {"none": [], "answer": [x[k]],
                  "same, other": [references[k + 1], references[k + 2]]}
        made = {name: upscale(small, r, model, progress=False)
                for name, r in given.items()}
        made["bicubic"] = enlarge_images(small[None])[0]
        for name, image in made.items():
            found.setdefault(name, []).append(psnr(image, x[k]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_matches_in_blocks_are_those_of_match_patches(monkeypatch):
    monkeypatch.setattr(superres, "BLOCK", 37)
    a, b = (x.double() - 0.5 for x in photos(0, (20, 11), (31, 17)))
    index, cosine = match_patches(a, b)
    best, found = best_rows(patch_rows(a), patch_rows(b))
    assert torch.equal(found, index.flatten())
    assert torch.allclose(best, cosine.flatten(), atol=1e-12)


@pytest.mark.parametrize("h, w, side", [(3, 3, 96), (10, 7, 3), (96, 97, 96), (1, 5, 2)])
def test_tiles_cover_every_pixel_once(h, w, side):
    count = torch.zeros(h, w)
    for part in tiles(h, w, side):
        count[part] += 1
        assert all(s.stop - s.start <= side for s in part)
    assert bool((count == 1).all())


@pytest.mark.parametrize("blocks, sisr_blocks", [(1, 1), (1, 3), (3, 2)])
def test_the_radius_is_that_of_the_derivatives(blocks, sisr_blocks):
    model, side = little(blocks, sisr_blocks, 0.4), 50
    photo = photos(1, (side, side))[0][None].requires_grad_()
    made = model(model.sisr(photo), torch.rand(1, 3, 200, 200),
                 torch.rand(1, 4, side, side))
    reached = []
    for pixel in range(4):
        slope, = torch.autograd.grad(made[0, :, 100 + pixel, 100 + pixel].sum(), photo,
                                     retain_graph=True)
        rows = slope[0].abs().sum((0, 2)).nonzero()
        reached += [25 - rows.min().item(), rows.max().item() - 25]
    assert max(reached) == receptive_radius(model)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("side", [7, 19])
def test_tiles_give_what_one_piece_gives(count, side):
    photo, *references = photos(2, (33, 40), (48, 61), (30, 52))
    whole, tiled = (upscale(photo, references[:count], little(), tile, False)
                    for tile in (None, side))
    assert (whole - tiled).abs().max() <= TOLERANCE


@pytest.mark.parametrize("missing", [1, 5, 11])
def test_a_margin_below_the_radius_is_seen(missing, monkeypatch):
    photo, reference = photos(2, (33, 40), (48, 61))
    whole = upscale(photo, reference, little(scale=0.4), None, False)
    margin = receptive_radius(little()) - missing
    monkeypatch.setattr(superres, "receptive_radius", lambda model: margin)
    tiled = upscale(photo, reference, little(scale=0.4), 7, False)
    assert (whole - tiled).abs().max() > 100 * TOLERANCE


def test_tiles_of_the_model_that_ships_agree():
    scene = scene_pairs(200, 1, ("same",), "tiles")
    small, reference = reduce_images(scene["x"] / 255)[0], scene["reference"][0] / 255
    model = cg.load("gated-upscaler")
    whole, tiled = (upscale(small, reference, model, tile, False)
                    for tile in (None, 24))
    # equally good matches may be chosen differently
    assert ((whole - tiled).abs() > TOLERANCE).float().mean() < 1e-3


@pytest.mark.parametrize("refine", [True, False])
def test_one_piece_is_the_models_own_result(refine):
    photo, reference = photos(3, (20, 26), (40, 52))
    model = little()
    model.refine = refine
    made = upscale(photo, reference, model, progress=False)
    wanted = model.upscale(photo[None], reference[None])[0]
    assert (made - wanted).abs().max() <= TOLERANCE
    alone = upscale(photo, (), model, progress=False)
    assert (alone - model.upscale(photo[None])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("count", [0, 1, 2])
def test_weight_zero_is_exactly_the_result_without_references(count):
    photo, *references = photos(9, (33, 21), (48, 61), (30, 52))
    alone = upscale(photo, (), little(), 11, False)
    zero, one, plain = (upscale(photo, references[:count], little(), 11, False, **given)
                        for given in ({"weight": 0}, {"weight": 1.0}, {}))
    assert torch.equal(zero, alone) and torch.equal(one, plain)
    assert torch.equal(plain, alone) == (count == 0)


def test_both_ends_of_the_weight_are_exact():
    base, made = torch.rand(2, 3, 40, 41, generator=torch.Generator().manual_seed(0))
    assert torch.equal(superres.weigh(base, made, 0), base)
    assert torch.equal(superres.weigh(base, made, 1), made)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.5])
def test_the_weight_multiplies_what_references_add(weight):
    photo, reference = photos(9, (20, 21), (48, 61))
    alone, one, made = (upscale(photo, reference, little(scale=0.1), 9, False, weight=w)
                        for w in (0, 1, weight))
    free = ((one > 0) & (one < 1) & (made > 0) & (made < 1) & (alone > 0) & (alone < 1))
    assert free.float().mean() > 0.2
    assert torch.allclose((made - alone)[free], weight * (one - alone)[free], atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, torch.inf, torch.nan, "1", True, None])
def test_other_weights_are_refused(weight):
    photo, reference = photos(9, (5, 5), (12, 12))
    with pytest.raises(ValueError, match="weight=.*accepted: a finite number, 0 or mo"):
        upscale(photo, reference, little(), progress=False, weight=weight)


def test_the_order_of_references_does_not_matter():
    photo, a, b = photos(4, (20, 22), (36, 50), (44, 20))
    made = [upscale(photo, pair, little(), progress=False) for pair in ([a, b], [b, a])]
    assert (made[0] - made[1]).abs().max() <= TOLERANCE
    assert (made[0] - upscale(photo, a, little(), progress=False)).abs().max() > 0.01


@pytest.mark.parametrize("photo, reference", [
    ((3, 3), (12, 12)), ((3, 50), (15, 13)), ((41, 4), (12, 99))])
def test_any_sizes_are_enlarged(photo, reference):
    x, r = photos(5, photo, reference)
    made = upscale(x, r, little(), 16, False)
    assert made.shape == (3, 4 * photo[0], 4 * photo[1])
    assert made.min() >= 0 and made.max() <= 1 and made.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


def largest(photo, reference, tile):
    with Largest() as seen:
        upscale(photo, reference, little(), tile, False)
    return seen.numbers


def test_no_tensor_grows_with_the_pairs_of_patches(monkeypatch):
    """Work takes what a tile takes; otherwise images and patches are the largest."""
    monkeypatch.setattr(superres, "BLOCK", 64)
    photo, reference = photos(6, (60, 60), (160, 160))
    patches = 27 * 38 * 38
    tile = 16 * 432 * 49  # windows of a row of matches that is refined
    bound = max(patches, tile, 3 * 166 * 166, 3 * 240 * 240)
    assert largest(photo, reference, 16) <= bound
    assert largest(photo, reference, None) > bound
    monkeypatch.setattr(superres, "BLOCK", 4096)
    assert largest(photo, reference, 60) > bound


def test_the_answer_as_reference_is_better_than_all():
    found = scene_quality()
    others = {name: value for name, value in found.items() if name != "answer"}
    assert found["answer"] > max(others.values()), found
    assert found["answer"] > found["bicubic"] + 3 and found["none"] > found["bicubic"]
    assert min(found["shift"], found["same"]) > found["other"] + 1, found


def test_a_wrong_reference_costs_little():
    found = scene_quality()
    assert min(found["other"], found["noise"]) > found["none"] - LOSS, found
    assert found["same, other"] > found["same"] - LOSS, found


def test_images_that_do_not_fit_are_refused():
    photo, reference = photos(7, (9, 9), (16, 16))
    for bad in (photo[None], photo[:1], photo[:, :2], "photo", None):
        with pytest.raises(ValueError, match=r"a photo .*accepted: a tensor \(3, h, w"):
            upscale(bad, reference, progress=False)
    for bad in (2 * photo, photo.byte(), photo * torch.nan):
        with pytest.raises(ValueError, match="accepted"):
            upscale(bad, progress=False)
    with pytest.raises(ValueError, match="a reference .*sides of 12 or more"):
        upscale(photo, [reference, reference[:, :11]], progress=False)
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="tile=.*an integer, 1 or more"):
            upscale(photo, (), little(), bad, False)
    with pytest.raises(ValueError, match="SISR; accepted: GatedTransfer"):
        upscale(photo, (), cg.SISR((3, 32, 32), 4, 1), progress=False)
    with pytest.raises(ValueError, match="4100 × 4000 pixels; accepted: 4,194,304"):
        superres.check_sizes_of((4000, 4100), ())
    with pytest.raises(ValueError, match="references of 18,000,000 pixels one below"):
        superres.check_sizes_of((9, 9), [(3000, 3000)] * 2)
    with pytest.raises(ValueError, match="references of .* pixels one below the other"):
        superres.check_sizes_of((9, 9), [(12, 9000), (9000, 12)])


# files and the command ---------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images that are accepted, and a fast model."""
    monkeypatch.setattr(superres, "load", lambda name: little())
    for name, size in (("photo.png", (12, 9)), ("other.png", (30, 21))):
        x = (255 * photos(8, size[::-1])[0]).byte().movedim(0, 2)
        Image.fromarray(x.contiguous().numpy()).save(tmp_path / name)
    return tmp_path


def called(arguments, folder, monkeypatch, capsys):
    """Exit code of a command in a folder, and what it said on the error channel."""
    from condgen.__main__ import main

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["condgen", "upscale", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


def png(place, image, **options):
    image.save(place, **options)


def deep_colour(place):
    """A PNG file of three channels with 16 bits each."""
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes(6 * 16) for _ in range(16))
    place.write_bytes(b"\x89PNG\r\n\x1a\n"
                      + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
                      + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


BAD = {
    "text": (lambda p: p.write_text("none"), "damaged or in another format; accepted"),
    "torn": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), "accepted"),
    "folder": (lambda p: p.mkdir(), "is a folder; accepted: an image file"),
    "missing": (lambda p: None, "no file .*; accepted: an image file"),
    "dot": (lambda p: png(p, Image.new("RGB", (1, 1))), "it has 1 × 1 pixels; accepted"),
    "grey of 16 bits": (lambda p: png(p, Image.new("I;16", (16, 16))),
                        "16 bits per channel; accepted: 8 bits"),
    "colour of 16 bits": (deep_colour, "16 bits per channel; accepted: 8 bits"),
    "floats": (lambda p: png(p, Image.new("F", (16, 16)), format="TIFF"),
               "bits per channel; accepted: 8 bits"),
    "glass": (lambda p: png(p, Image.new("RGBA", (16, 16), (9, 9, 9, 254))),
              "transparent pixels; accepted: an opaque image"),
    "palette": (lambda p: png(p, Image.new("P", (16, 16)), transparency=0),
                "transparent pixels; accepted: an opaque image"),
    "film": (lambda p: png(p, Image.new("L", (16, 16)), format="GIF", save_all=True,
                           append_images=[Image.new("L", (16, 16), 9)]),
             "2 frames; accepted: one"),
}


@pytest.mark.parametrize("role", ["photo", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_explained_and_nothing_is_written(name, role, folder, monkeypatch,
                                                        capsys):
    make, said = BAD[name]
    make(folder / "bad.png")
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(superres, "load", lambda name: pytest.fail("work"))
    given = (["bad.png", "-r", "other.png"] if role == "photo"
             else ["photo.png", "--reference", "bad.png"])
    code, line = called([*given, "-o", "big.png"], folder, monkeypatch, capsys)
    assert code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert "bad.png" in line and re.search(said, line), line
    assert sorted(p.name for p in folder.iterdir()) == before


MISTAKES = {
    "negative weight": (["photo.png", "--weight", "-0.5", "-o", "big.png"],
                        "weight=-0.5; accepted: a finite number, 0 or more"),
    "no number": (["photo.png", "--weight", "nan", "-o", "big.png"],
                  "weight=nan; accepted: a finite number"),
    "small reference": (["photo.png", "-r", "photo.png", "-o", "big.png"],
                        "it has 12 × 9 pixels; accepted: 12 or more along each side"),
    "no photo": ([], "Missing argument 'PHOTO'"),
    "no picture": (["photo.png", "-o", "big.txt"], "as a picture; accepted: .png"),
    "result is a folder": (["photo.png", "-o", "kept.png"], "it is a folder"),
    "below a file": (["photo.png", "-o", "other.png/big.png"], "cannot make folder"),
    "the photo itself": (["photo.png", "-o", "photo.png"], "one of the images that are"),
    "the reference": (["photo.png", "-r", "other.png", "-o", "other.png"],
                      "one of the images that are read; accepted: another file"),
    "empty path": (["photo.png", "-r", "", "-o", "big.png"], "is empty; accepted: a pa"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_any_work(name, folder, monkeypatch, capsys):
    (folder / "kept.png").mkdir()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(superres, "load", lambda name: pytest.fail("work"))
    arguments, said = MISTAKES[name]
    code, line = called(arguments, folder, monkeypatch, capsys)
    assert code == 2 and said in line and line.count("\n") == 1, line
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_folder_without_permission_is_found_before(folder, monkeypatch, capsys):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(superres, "load", lambda name: pytest.fail("work"))
    monkeypatch.setattr("condgen.files.tempfile.TemporaryFile", deny)
    code, line = called(["photo.png", "-o", "big.png"], folder, monkeypatch, capsys)
    assert code == 2 and line.startswith("error: cannot write big.png: Permission den")


def test_a_full_disk_keeps_what_was_there(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    (folder / "big.png").write_bytes(b"old")
    monkeypatch.setattr("condgen.files.os.fsync", full)
    code, said = called(["photo.png", "-o", "big.png"], folder, monkeypatch, capsys)
    assert code == 2 and "cannot write big.png: No space left on device" in said
    assert (folder / "big.png").read_bytes() == b"old"
    assert sorted(p.name for p in folder.iterdir()) == ["big.png", "other.png",
                                                        "photo.png"]


def test_an_interrupted_command_writes_nothing(folder, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(superres, "tile_pairs", stop)
    code, said = called(["photo.png", "-o", "big.png"], folder, monkeypatch, capsys)
    assert code == 130 and said.endswith("condgen: interrupted; nothing was written\n")
    assert not (folder / "big.png").exists()


@pytest.mark.parametrize("end", ["png", "jpg", "webp"])
def test_the_command_writes_what_the_function_returns(end, folder, monkeypatch, capsys):
    code, said = called(["photo.png", "-r", "other.png", "--reference", "other.png",
                         "-o", f"new/big.{end}"], folder, monkeypatch, capsys)
    assert code == 0 and "upscale: 100%" in said.replace("|", "")
    made = Image.open(folder / "new" / f"big.{end}")
    assert made.size == (48, 36) and made.mode == "RGB"
    photo, other = (read_photo(folder / name, 3)[0] for name in ("photo.png",
                                                                 "other.png"))
    wanted = (255 * upscale(photo, [other] * 2, little(), progress=False)).round()
    if end == "png":
        found = torch.frombuffer(bytearray(made.tobytes()), dtype=torch.uint8)
        assert torch.equal(found.view(36, 48, 3).movedim(2, 0), wanted.byte())


def test_the_command_takes_a_weight(folder, monkeypatch, capsys):
    made = {}
    for name, given in (("alone", []), ("zero", ["-r", "other.png", "--weight", "0"]),
                        ("one", ["-r", "other.png"]),
                        ("three", ["-r", "other.png", "--weight", "3"])):
        code, _ = called(["photo.png", *given, "-o", f"{name}.png"], folder, monkeypatch,
                         capsys)
        assert code == 0
        made[name] = (folder / f"{name}.png").read_bytes()
    assert made["zero"] == made["alone"]
    assert len({made[name] for name in ("alone", "one", "three")}) == 3


def test_grey_profile_and_orientation_are_kept(folder):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("L", (16, 10), 99).save(folder / "grey.jpg", exif=exif,
                                      icc_profile=b"profile")
    made = Image.open(upscale_file(folder / "grey.jpg", [], folder / "big.png", False))
    assert made.mode == "L" and made.size == (40, 64)
    assert made.info["icc_profile"] == b"profile" and not made.getexif()
    Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save(folder / "opaque.png")
    x, facts = read_photo(folder / "opaque.png", 3)
    assert facts["mode"] == "RGB" and (255 * x[:, 0, 0]).tolist() == [1, 2, 3]


def test_results_larger_than_a_format_are_refused(folder, monkeypatch):
    stream = io.BytesIO()
    Image.new("L", (5000, 3)).save(stream, "PNG")
    (folder / "wide.png").write_bytes(stream.getvalue())
    monkeypatch.setattr(superres, "load", lambda name: pytest.fail("work"))
    with pytest.raises(ValueError, match="20000 × 12 pixels.*accepted: 16,383 along"):
        upscale_file(folder / "wide.png", [], folder / "big.webp", False)


def test_the_help_shows_the_command(folder, monkeypatch, capsys):
    from typer.testing import CliRunner

    from condgen.__main__ import app

    shown = CliRunner().invoke(app, ["upscale", "--help"]).output
    assert "--reference" in shown and "PHOTO" in shown
    assert "upscale" in CliRunner().invoke(app, ["--help"]).output
