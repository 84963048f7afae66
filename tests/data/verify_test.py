import re

import numpy as np
from PIL import Image
import pytest
import tiny_archives as tiny

from kdseg.data import __main__ as command
from kdseg.data import alike
from kdseg.data import masks
from kdseg.data import pairs
from kdseg.data import prepare
from kdseg.data import verify
from kdseg.data.archives import DataError
from kdseg.data.sets import synthetic


def _drawings(count: int) -> list[np.ndarray]:
  return [
    synthetic.draw(np.random.default_rng(seed), 96)[0] for seed in range(count)
  ]


def _alike(pictures: list[np.ndarray], names: list[str]) -> list[tuple]:
  thumbs = dict(zip(names, map(alike.thumb, pictures), strict=True))
  return [(pair.first, pair.second) for pair in alike.find_alike(thumbs)]


def test_different_lesions_are_not_alike():
  pictures = _drawings(40)
  assert _alike(pictures, [f"train/{n}" for n in range(40)]) == []


def _orientations(picture: np.ndarray) -> list[np.ndarray]:
  turned = [np.rot90(picture, k) for k in range(4)]
  return turned + [turn[:, ::-1] for turn in turned]


@pytest.mark.parametrize("way", range(8))
def test_a_copy_is_found_whichever_way_it_lies(way):
  pictures = _drawings(6)
  pictures.append(np.ascontiguousarray(_orientations(pictures[2])[way]))
  names = [*(f"train/{n}" for n in range(6)), "test/copy"]
  assert _alike(pictures, names) == [("train/2", "test/copy")]


def _resaved(picture: np.ndarray) -> np.ndarray:
  content = tiny.encode(picture, "JPEG")
  return verify.decode.decode_image(content, "")


def _halved(picture: np.ndarray) -> np.ndarray:
  return np.asarray(Image.fromarray(picture).resize((48, 48)))


def _squashed(picture: np.ndarray) -> np.ndarray:
  return np.asarray(Image.fromarray(picture).resize((120, 90)))


@pytest.mark.parametrize("copy", [_resaved, _halved, _squashed])
def test_a_copy_is_found_after_saving_and_resizing(copy):
  pictures = _drawings(6)
  pictures.append(copy(pictures[4]))
  names = [f"train/{n}" for n in range(7)]
  assert _alike(pictures, names) == [("train/4", "train/6")]


def test_hash_distance_equals_counting_bits_one_by_one():
  thumbs = np.stack([alike.thumb(picture) for picture in _drawings(5)])
  thumbs[4] = thumbs[1] + 0.5 * (thumbs[0] - thumbs[1])
  hashes = alike.perceptual_hash(thumbs)
  assert hashes.shape == (5, 4)
  # A one-bit weight of the transform: 127 of 255 lie above the median.
  assert {int(np.bitwise_count(row).sum()) for row in hashes} == {127}
  bits = [np.unpackbits(row.view(np.uint8)) for row in hashes]
  assert all(row[-1] == 0 for row in bits)
  slow = sum(a != b for a, b in zip(bits[1], bits[4], strict=True))
  fast = np.bitwise_count(hashes[1] ^ hashes[4]).sum()
  assert slow == fast > 0


@pytest.mark.parametrize("edge", ["top", "bottom", "left", "right", "none"])
def test_a_mask_touches_the_frame_at_any_edge(edge):
  mask = np.zeros((5, 6), bool)
  mask[2, 2] = True
  at = {"top": (0, 3), "bottom": (4, 3), "left": (2, 0), "right": (2, 5)}
  if edge in at:
    mask[at[edge]] = True
  assert (masks.frame_share(mask) > 0) == (edge != "none")


@pytest.fixture
def faulty(tmp_path, make_folder):
  """A folder with one fault of each kind."""
  root = make_folder(tmp_path / "own" / "train", [f"t{n}" for n in range(6)])
  make_folder(tmp_path / "own" / "test", ["e0"])
  empty = tiny.mask_bytes(np.zeros((tiny.HEIGHT, tiny.WIDTH), bool))
  full = tiny.mask_bytes(np.ones((tiny.HEIGHT, tiny.WIDTH), bool))
  grey = tiny.encode(np.full((tiny.HEIGHT, tiny.WIDTH), 99, np.uint8), "PNG")
  tiny.write_folder(
    root,
    {
      "masks/t0.png": empty,
      "masks/t1.png": full,
      "masks/t2.png": grey,
      "masks/t3.png": tiny.mask_bytes(tiny.lesion(0, 5, 5)),
      "images/t4.png": b"\x89PNG and nothing else",
      "images/t9.png": tiny.encode(tiny.picture(9), "PNG"),
    },
  )
  return tmp_path / "own"


def test_every_fault_is_listed_not_only_the_first(faulty):
  report = verify.verify("folder", manual_dir=faulty)
  assert not report.ok
  joined = "\n".join(report.problems)
  assert len(report.problems) == 6
  for part in (
    "t9: no mask",
    "t2.png is a mask with grey values",
    "t3: the mask is 5x5",
    "t4.png cannot be decoded",
    "folder has no pair for validation,",
    "train/t0 and test/e0 (0 of 255 bits differ) look like the same picture",
  ):
    assert part in joined
  assert report.empty == ("train/t0",)
  assert report.touching == ("train/t1",)
  assert report.inventory.found == {"train": 6, "test": 1}
  # e0 and t0 were drawn from one seed.
  assert [(p.first, p.second, p.across) for p in report.alike] == [
    ("train/t0", "test/e0", True)
  ]


def test_grey_masks_are_no_fault_when_asked(faulty):
  report = verify.verify("folder", manual_dir=faulty, grey_masks="threshold")
  assert not any("grey values" in problem for problem in report.problems)
  assert "train/t2" in report.empty


def test_sizes_are_the_smallest_median_and_largest(tmp_path):
  for width, name in ((10, "a"), (20, "b"), (90, "c")):
    tiny.write_folder(
      tmp_path / "test",
      {
        f"images/{name}.png": tiny.encode(tiny.picture(0, 8, width), "PNG"),
        f"masks/{name}.png": tiny.mask_bytes(tiny.lesion(0, 8, width)),
      },
    )
  text = verify.describe(verify.verify("folder", manual_dir=tmp_path))
  assert "width 10/20/90, height 8/8/8" in text
  assert text.endswith("\nok")


def test_counts_are_held_against_the_official_ones(tmp_path, isic):
  report = verify.verify("isic2016", manual_dir=isic.write(tmp_path))
  assert report.ok
  text = verify.describe(report)
  assert "31 of 900 found" in text
  assert "379 of 379 found" in text
  assert "kept out of training: ISIC_0001184" in text


def test_prepared_records_are_verified_without_their_source(tmp_path, isic):
  manual_dir = isic.write(tmp_path / "manual")
  from_files = verify.verify("isic2016", manual_dir=manual_dir)
  kwargs = {"data_dir": tmp_path / "data"}
  with pytest.raises(DataError, match=r"not prepared in .*isic2016"):
    verify.verify("isic2016", **kwargs)
  prepare.prepare("isic2016", manual_dir=manual_dir, **kwargs)
  from_records = verify.verify("isic2016", **kwargs)
  for field in ("official", "sizes", "touching", "alike"):
    assert getattr(from_records, field) == getattr(from_files, field)
  for field in ("found", "excluded", "notes", "stamp"):
    expected = getattr(from_files.inventory, field)
    assert getattr(from_records.inventory, field) == expected


@pytest.mark.parametrize("lesion", ["black", "any", "2"])
def test_prepared_masks_went_through_the_rule_already(
  tmp_path, make_folder, lesion
):
  own = make_folder(tmp_path / "own", ["a", "b", "c"])
  for path in (own / "masks").iterdir():
    mask = tiny.lesion(0)
    values = ~mask * 255 if lesion == "black" else mask * 2
    path.write_bytes(tiny.encode(values.astype(np.uint8), "PNG"))
  where = {"data_dir": tmp_path / "data", "lesion": lesion}
  prepare.prepare("folder", manual_dir=own, **where)
  report = verify.verify("folder", directory=str(own), **where)
  assert (report.problems, report.empty, report.touching) == ((), (), ())


def test_long_lists_are_cut_and_counted():
  problems = [f"{kind * 3}: all {kind * 5}" for kind in "abcdefghi"]
  report = verify.Report("x", pairs.Inventory({}), {}, {}, tuple(problems))
  text = verify.describe(report, limit=2)
  assert "9 problems" in text
  assert "bbb: all bbbbb\n  and 7 more" in text
  assert text.endswith("not usable as it is")


def test_24_times_one_mistake_is_one_line_with_a_count_and_examples(
  tmp_path, make_folder, capsys
):
  own = make_folder(tmp_path, [f"p{n:02}" for n in range(24)])
  for n, path in enumerate(sorted((own / "masks").iterdir())):
    values = np.resize(np.arange(2 + n % 3 + 1, dtype=np.uint8), (8, 12))
    path.write_bytes(tiny.encode(values, "PNG"))
  assert command.main(["verify", "folder", "--manual-dir", str(own)]) == 1
  printed = capsys.readouterr().out
  assert "\n24 problems, each" in printed
  [line] = [line for line in printed.splitlines() if "mask of classes" in line]
  assert line.startswith("  24 times: ")
  assert line.endswith(" and 21 more.")
  assert len(re.findall(r"masks/p\d\d\.png", line)) == 3


@pytest.mark.parametrize("count", [3, 40])
def test_inverted_masks_are_warned_of_with_the_flag_that_inverts(
  tmp_path, make_folder, count
):
  own = make_folder(tmp_path, [f"p{n}" for n in range(count)])
  paths = sorted((own / "masks").iterdir())
  for n, path in enumerate(paths):
    # A fifth may be as they should be.
    mask = tiny.lesion(n)
    path.write_bytes(tiny.mask_bytes(mask if n < count // 5 else ~mask))
  [warning] = [
    line
    for line in verify.verify("folder", manual_dir=own).warnings
    if "inverted" in line
  ]
  option = re.search(r"--option lesion=(\w+)", warning)[1]
  assert option == "black"
  assert "--config.data.options.folder.lesion=black" in warning
  turned = verify.verify("folder", manual_dir=own, lesion=option)
  assert not any("inverted" in line for line in turned.warnings)
  assert len(turned.touching) == count // 5


def test_a_copy_in_two_splits_is_refused_until_its_id_is_allowed(
  tmp_path, make_folder, capsys
):
  own = make_folder(tmp_path, ["a", "b", "c"])
  picture = Image.fromarray(synthetic.draw(np.random.default_rng(0), 96)[0])
  ways = {"a": picture, "b": picture.rotate(180), "c": picture.resize((60, 60))}
  for name, image in ways.items():
    image.convert("RGB").save(own / "images" / f"{name}.png")
    mask = tiny.lesion(0, image.height, image.width)
    (own / "masks" / f"{name}.png").write_bytes(tiny.mask_bytes(mask))
  arguments = ["verify", "folder", "--manual-dir", str(own)]
  assert command.main(arguments) == 1
  printed = capsys.readouterr().out
  assert "3 problems" in printed
  flags = re.findall(r"--allow-alike (\w)\)", printed)
  assert flags
  assert command.main([*arguments, "--allow-alike", "a,b"]) == 0
  assert command.main([*arguments, "--allow-alike", "c"]) == 1


# The command line.


def test_verify_ends_with_0_or_1(tmp_path, faulty, make_folder, capsys):
  good = make_folder(tmp_path / "good", ["a", "b", "c"])
  assert command.main(["verify", "folder", "--manual-dir", str(good)]) == 0
  assert capsys.readouterr().out.rstrip().endswith("ok")
  assert command.main(["verify", "folder", "--manual-dir", str(faulty)]) == 1
  assert "6 problems" in capsys.readouterr().out


def test_prepare_prepares_and_says_what_it_found(tmp_path, isic, capsys):
  arguments = ["prepare", "isic2016", "--data-dir", str(tmp_path / "data")]
  arguments += ["--manual-dir", str(isic.write(tmp_path / "manual"))]
  assert command.main(arguments) == 0
  printed = capsys.readouterr().out
  assert "31 of 900 official pairs found" in printed
  assert prepare.is_prepared(
    prepare.make_builder("isic2016", data_dir=tmp_path / "data")
  )


def test_an_error_is_one_line_on_stderr_and_status_1(tmp_path, capsys):
  (tmp_path / "PH2Dataset.rar").write_bytes(b"Rar!")
  arguments = ["prepare", "ph2", "--manual-dir", str(tmp_path)]
  assert command.main([*arguments, "--data-dir", str(tmp_path / "data")]) == 1
  captured = capsys.readouterr()
  assert captured.err.rpartition("error: ")[2].count("unrar") == 1
  assert "Traceback" not in captured.err


def test_an_option_is_passed_on_and_an_unknown_one_named(
  tmp_path, isic, capsys
):
  arguments = ["verify", "isic2016"]
  arguments += ["--manual_dir", str(isic.write(tmp_path))]  # the older spelling
  assert command.main([*arguments, "--option", "duplicates=include"]) == 0
  assert "kept in training" in capsys.readouterr().out
  assert command.main([*arguments, "--option", "duplicate=include"]) == 1
  assert 'did you mean "duplicates"' in capsys.readouterr().err
