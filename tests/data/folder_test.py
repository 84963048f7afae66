import io
import itertools
import os
import pathlib
import re

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
import tiny_archives as tiny

from kdseg.data import __main__ as command
from kdseg.data import archives
from kdseg.data import decode
from kdseg.data import layouts
from kdseg.data import loading
from kdseg.data import pairs
from kdseg.data import prepare
from kdseg.data.archives import DataError
from kdseg.data.sets import folder

NAMES = tuple(f"lesion_{n}" for n in range(60))
TEST_NUMBERS = (
  17,
  21,
  33,
  35,
  36,
  48,
)  # of their test split, as of every version


def split_ids(found):
  return {k: [pair.id for pair in v] for k, v in found.splits.items()}


def test_a_flat_folder_is_divided_exactly_by_the_rank_of_a_hash(
  tmp_path, make_folder
):
  found = folder.take_inventory(make_folder(tmp_path, NAMES))
  found.check()
  divided = split_ids(found)
  assert {k: len(ids) for k, ids in divided.items()} == {
    "train": 48, "validation": 6, "test": 6,
  }  # fmt: skip
  assert sorted(itertools.chain(*divided.values())) == sorted(NAMES)
  assert all(ids == sorted(ids) for ids in divided.values())
  assert divided["test"] == [f"lesion_{n}" for n in TEST_NUMBERS]
  [note] = found.notes
  assert note.endswith("of the names: 48 train, 6 validation, 6 test")


@pytest.mark.parametrize(
  ("count", "sizes"),
  [(1, [1]), (2, [2]), (3, [1, 1, 1]), (16, [12, 2, 2]), (200, [160, 20, 20])],
)
def test_no_split_is_empty_from_three_pairs_on(count, sizes):
  image = mask = archives.File("", "", "", 0, bytes)
  found = [pairs.Pair(f"{n}", image, mask) for n in range(count)]
  divided = folder.divide(found)
  assert [len(part) for part in divided.values() if part] == sizes
  # In any order.
  assert folder.divide(found[::-1]) == divided


def test_sub_folders_are_the_splits(tmp_path, make_folder):
  make_folder(tmp_path / "train", ["a", "b"])
  make_folder(tmp_path / "test", ["c"])
  found = folder.take_inventory(tmp_path)
  found.check()
  assert {k: [p.id for p in v] for k, v in found.splits.items()} == {
    "train": ["a", "b"],
    "test": ["c"],
  }


def test_formats_endings_and_nested_folders_match_by_stem(tmp_path):
  jpeg = tiny.encode(tiny.picture(0), "JPEG")
  mask = tiny.mask_bytes(tiny.lesion(0), "BMP")
  tiny.write_folder(
    tmp_path,
    {
      "images/a.JPG": jpeg,
      "images/b.jpeg": jpeg,
      "images/site/c.jpg": jpeg,
      "images/d_mask.jpg": jpeg,
      "images/.DS_Store": b"",
      "masks/a.bmp": mask,
      "masks/b_Segmentation.bmp": mask,
      "masks/site/c_lesion.bmp": mask,
      "masks/d_mask_mask.bmp": mask,
    },
  )
  found = folder.take_inventory(tmp_path)
  found.check()
  ids = sorted(p.id for split in found.splits.values() for p in split)
  assert ids == ["a", "b", "d_mask", "site/c"]


def test_own_data_load_like_any_other(tmp_path, make_folder):
  make_folder(tmp_path / "own data", NAMES)
  arrays = loading.load(
    "folder",
    "test",
    size=8,
    data_dir=tmp_path / "prepared",
    manual_dir=tmp_path / "own data",
  )
  assert arrays.ids
  for index, id_ in enumerate(arrays.ids):
    np.testing.assert_array_equal(
      arrays.native_mask(index), tiny.lesion(NAMES.index(id_))
    )


def test_a_changed_folder_is_prepared_anew(tmp_path, make_folder):
  own = make_folder(tmp_path / "own", NAMES[:30])
  kwargs = {"size": 8, "data_dir": tmp_path / "data", "manual_dir": own}
  before = loading.load("folder", "train", **kwargs)
  make_folder(own, NAMES)
  after = loading.load("folder", "train", **kwargs)
  assert len(before) < len(after)


def test_a_pair_in_another_split_and_a_mask_drawn_anew_are_noticed(
  tmp_path, make_folder
):
  def load(split):
    return loading.load(
      "folder", split, size=32, data_dir=tmp_path / "data",
      manual_dir=tmp_path / "own",
    )  # fmt: skip

  make_folder(tmp_path / "own" / "train", ["a", "b"])
  make_folder(tmp_path / "own" / "test", ["c"])
  assert load("train").ids == ("a", "b")
  for kind in ("images", "masks"):
    [path] = (tmp_path / "own" / "train" / kind).glob("b*")
    path.rename(tmp_path / "own" / "test" / kind / path.name)
  assert load("train").ids == ("a",)
  assert load("test").ids == ("b", "c")

  [path] = (tmp_path / "own" / "train" / "masks").glob("a*")
  before = path.read_bytes()
  bitmap = path.with_suffix(".bmp")
  path.unlink()
  size = Image.open(io.BytesIO(before)).size
  for value in (0, 255):
    Image.new("L", size, value).save(bitmap)
    assert load("train").mask.min() == load("train").mask.max() == value // 255


def test_a_name_may_end_as_those_of_masks_do(tmp_path, make_folder):
  make_folder(tmp_path, ["p1_lesion", "p1_mask", "p1"])
  found = folder.take_inventory(tmp_path)
  found.check()
  ids = [pair.id for split in found.splits.values() for pair in split]
  assert sorted(ids) == ["p1", "p1_lesion", "p1_mask"]


def test_a_split_without_pairs_is_refused_where_verify_refuses_it(
  tmp_path, make_folder, capsys
):
  for count, gaps in ((2, "validation or test"), (1, "validation or test")):
    own = make_folder(tmp_path / f"own{count}", NAMES[:count])
    with pytest.raises(DataError, match="at least three in one images/"):
      loading.load(
        "folder", "validation", size=32, data_dir=tmp_path / "data",
        manual_dir=own,
      )  # fmt: skip
    assert command.main(["verify", "folder", "--manual-dir", str(own)]) == 1
    assert f"no pair for {gaps}" in capsys.readouterr().out


# Layouts of other tools.

IMAGE = tiny.encode(tiny.picture(0), "PNG")
MASK = tiny.mask_bytes(tiny.lesion(0))
LAYOUTS = {
  "upper case, labels": ("Images/{}.png", "labels/{}.png", ""),
  "annotations": ("img/{}.png", "annotations/{}.png", ""),
  "VOC": ("JPEGImages/{}.png", "SegmentationClass/{}.png", ""),
  "ending _gt": ("images/{}.png", "gt/{}_gt.png", ""),
  "side by side": ("{}.png", "{}_mask.png", ""),
  "nnU-Net": ("imagesTr/{}_0000.png", "labelsTr/{}.png", ""),
  "COCO": (
    "images/{}/{a}.png",
    "labels/{}/{a}.png",
    "train2017 val2017 test2017",
  ),
  "SMP CamVid": ("{}/{a}.png", "{}annot/{a}.png", "train val test"),
  "Carvana": ("{}_images/{a}.png", "{}_masks/{a}.png", "train valid test"),
  "in splits": (
    "{}/Images/{a}.png",
    "{}/annotations/{a}.png",
    "train dev test",
  ),
  "in splits, side by side": (
    "{}/{a}.png",
    "{}/{a}_mask.png",
    "Train Val Test",
  ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_tools_are_read(tmp_path, layout):
  image, mask, splits = LAYOUTS[layout]
  names = splits.split() or list("abcde")
  files = {
    pattern.format(name, a=f"{name}_7"): content
    for pattern, content in ((image, IMAGE), (mask, MASK))
    for name in names
  }
  found = folder.take_inventory(tiny.write_folder(tmp_path, files))
  found.check()
  assert set(found.splits) == {"train", "validation", "test"}
  ids = sorted(itertools.chain(*split_ids(found).values()))
  assert len(ids) == len(names)
  if splits:
    for split, name in zip(found.splits, names, strict=True):
      assert split_ids(found)[split] == [f"{name}_7"]
  else:
    assert ids == names


def test_nn_unets_test_set_is_the_test_set(tmp_path):
  files = {}
  for kind, content, ending in (
    ("images", IMAGE, "_0000"),
    ("labels", MASK, ""),
  ):
    for n in range(20):
      files[f"{kind}Tr/t{n}{ending}.png"] = content
    files[f"{kind}Ts/e{ending}.png"] = content
  files["dataset.json"] = b"{}"
  found = folder.take_inventory(tiny.write_folder(tmp_path, files))
  found.check()
  assert {k: len(v) for k, v in split_ids(found).items()} == {
    "train": 18, "validation": 2, "test": 1,
  }  # fmt: skip
  assert split_ids(found)["test"] == ["e"]


def test_folders_that_are_not_read_are_named(tmp_path, make_folder):
  make_folder(tmp_path, ["a", "b", "c"])
  make_folder(tmp_path / "train", ["d"])
  make_folder(tmp_path / "old", ["e"])
  note = folder.take_inventory(tmp_path).notes[0]
  assert note.startswith("not read: old/, train/ of ")


def test_two_folders_of_one_split_are_refused(tmp_path, make_folder):
  for name in ("val", "dev"):
    make_folder(tmp_path / name, [name])
  with pytest.raises(DataError, match="dev/ and val/, both of the validation"):
    folder.take_inventory(tmp_path)


def test_outlines_in_json_are_named_with_what_to_do(tmp_path):
  files = {"images/a.png": IMAGE, "annotations/instances.json": b"{}"}
  problems = folder.take_inventory(tiny.write_folder(tmp_path, files)).problems
  assert any("JSON have to be drawn as PNG" in problem for problem in problems)


def test_an_image_of_which_nobody_can_say_whether_it_is_turned_is_refused(
  tmp_path, make_folder
):
  own = make_folder(tmp_path / "own", ["a", "b", "lesion_7"])
  path = own / "images" / "lesion_7.png"
  with Image.open(path) as image:
    image.save(path, exif=b"neither II nor MM")
  with pytest.raises(DataError, match=r"lesion_7\.png has damaged EXIF"):
    prepare.prepare("folder", data_dir=tmp_path / "data", manual_dir=own)


def test_it_is_a_tfds_builder(tmp_path, make_folder):
  own = make_folder(tmp_path / "own", ["a", "b"])
  builder = tfds.builder("folder", data_dir=tmp_path / "data")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=str(own), try_download_gcs=False
    )
  )
  assert sum(info.num_examples for info in builder.info.splits.values()) == 2


def test_a_folder_of_another_form_says_which_form_it_should_have(tmp_path):
  (tmp_path / "outlines").mkdir()
  with pytest.raises(
    DataError, match=r"neither images/ and masks/ nor .*, but outlines/\. Put"
  ):
    folder.take_inventory(tmp_path)
  (tmp_path / "maskss").mkdir()
  with pytest.raises(
    DataError, match=r"maskss/ \(did you mean \"masks\"\?\), "
  ):
    folder.take_inventory(tmp_path)
  (tmp_path / "images").mkdir()
  with pytest.raises(DataError, match=r"has no masks/"):
    folder.take_inventory(tmp_path)


def test_no_folder_says_what_to_pass(tmp_path):
  with pytest.raises(DataError, match=r"images/ and masks/.*as manual_dir"):
    prepare.prepare("folder", data_dir=tmp_path)


def test_an_empty_folder_is_refused(tmp_path, make_folder):
  for kind in ("images", "masks"):
    (tmp_path / "own" / kind).mkdir(parents=True)
  with pytest.raises(DataError, match="no pair of image and mask"):
    prepare.prepare(
      "folder", data_dir=tmp_path / "data", manual_dir=tmp_path / "own"
    )


@pytest.mark.parametrize(
  ("kind", "message"),
  [("images", r"b: no image in .*images"), ("masks", r"b: no mask in .*masks")],
)
def test_a_file_without_partner_is_named(tmp_path, make_folder, kind, message):
  make_folder(tmp_path, ["a", "b"])
  (tmp_path / kind / "b.png").unlink()
  with pytest.raises(DataError, match=message):
    folder.take_inventory(tmp_path).check()


def test_a_folder_with_a_problem_is_not_prepared(tmp_path, make_folder):
  own = make_folder(tmp_path / "own", NAMES)
  (own / "masks" / "lesion_7.png").unlink()
  with pytest.raises(DataError, match="lesion_7: no mask"):
    prepare.prepare("folder", data_dir=tmp_path / "data", manual_dir=own)
  left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
  assert left == []


def test_two_files_of_one_stem_and_strangers_are_named(tmp_path, make_folder):
  make_folder(tmp_path, ["a"])
  tiny.write_folder(tmp_path, {"masks/a_mask.png": b"", "images/a.csv": b""})
  problems = folder.take_inventory(tmp_path).problems
  assert any("has a twice" in problem for problem in problems)
  assert any("no images: a.csv" in problem for problem in problems)


def test_an_id_in_two_splits_is_named(tmp_path, make_folder):
  make_folder(tmp_path / "train", ["a", "b"])
  make_folder(tmp_path / "test", ["b"])
  with pytest.raises(DataError, match=r"b is in both train/ and test/"):
    folder.take_inventory(tmp_path).check()


def test_ids_whose_predictions_would_share_a_name_are_named(
  tmp_path, make_folder
):
  make_folder(tmp_path, ["a_b"])
  for kind in ("images", "masks"):
    content = (tmp_path / kind / "a_b.png").read_bytes()
    tiny.write_folder(tmp_path, {f"{kind}/a/b.png": content})
  with pytest.raises(DataError, match=r"a_b and a/b would both .* a_b\.png"):
    folder.take_inventory(tmp_path).check()


def test_names_match_however_their_letters_are_composed(tmp_path):
  image, mask = (
    tiny.encode(tiny.picture(0), "PNG"), tiny.mask_bytes(tiny.lesion(0)),
  )  # fmt: skip
  files = {"images/la\u0308sion.png": image, "masks/l\xe4sion.png": mask}
  found = folder.take_inventory(tiny.write_folder(tmp_path / "a", files))
  found.check()
  assert [p.id for pairs in found.splits.values() for p in pairs] == [
    "l\xe4sion"
  ]
  files |= {"images/l\xe4sion.png": image}
  found = folder.take_inventory(tiny.write_folder(tmp_path / "b", files))
  with pytest.raises(DataError, match="has l\xe4sion twice"):
    found.check()


def test_ids_that_differ_by_case_only_are_refused_with_the_reason(
  tmp_path, make_folder
):
  make_folder(tmp_path, ["a1", "A1"])
  with pytest.raises(DataError, match=r"called a1\.png on a disk that ignores"):
    folder.take_inventory(tmp_path).check()
  for kind, name in (("images", "a1"), ("masks", "A1")):
    (tmp_path / kind / f"{name}.png").unlink()
  with pytest.raises(DataError, match=r"A1: no mask .* a1 differ by case only"):
    folder.take_inventory(tmp_path).check()


@pytest.mark.parametrize("raw", [b"caf\xe9", b"a\nok: b", b"\x1b[2J"])
def test_an_id_that_would_break_a_table_is_named(tmp_path, make_folder, raw):
  make_folder(tmp_path, [os.fsdecode(raw)])
  with pytest.raises(
    DataError, match=r"control character .*rename it"
  ) as error:
    folder.take_inventory(tmp_path).check()
  assert str(error.value).isprintable()


def test_an_id_too_long_for_the_name_of_a_prediction_is_named(
  tmp_path, make_folder
):
  (tmp_path / "images" / ("d" * 200)).mkdir(parents=True)
  (tmp_path / "masks" / ("d" * 200)).mkdir(parents=True)
  make_folder(tmp_path, [f"{'d' * 200}/{'e' * 60}"])
  with pytest.raises(DataError, match=r"ddd/eee.* is too long for the name"):
    folder.take_inventory(tmp_path).check()


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_bomb_among_own_data_is_named_and_leaves_nothing(
  tmp_path, make_folder, kind
):
  own = make_folder(tmp_path / "own", NAMES[:3])
  Image.new("1", (12_000, 12_000)).save(own / kind / "lesion_1.png")
  with pytest.raises(
    DataError, match=rf"{kind}/lesion_1\.png claims 12000x12000 pixels"
  ):
    prepare.prepare("folder", data_dir=tmp_path / "data", manual_dir=own)
  left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
  assert left == []


def test_ids_of_any_script_formulas_and_markup_come_back_as_they_were(
  tmp_path, make_folder
):
  names = ["=cmd()", "+1", "-1", "@x", "a,b", '"q"', "a|b`c", "<script>"]
  names += ["läsion 7", "皮膚", "nbsp\xa0"]
  make_folder(tmp_path / "own" / "train", names)
  arrays = loading.load(
    "folder",
    "train",
    size=8,
    data_dir=tmp_path / "data",
    manual_dir=tmp_path / "own",
  )
  assert sorted(arrays.ids) == sorted(names)


def test_the_page_on_folders_names_every_kind_split_and_ending():
  page = pathlib.Path(folder.__file__).parents[3] / "docs" / "own_folders.md"
  text = page.read_text(encoding="utf-8")
  for suffix in decode.SUFFIXES:
    assert f"`{suffix}`" in text
  for ending in re.findall(r"`(_[a-z]+)`", text):
    assert layouts.MASK_ENDING.fullmatch(ending), ending
  for name in ("validation", "val", "valid", "dev"):
    assert f"`{name}`" in text
    assert layouts.split_of_folder(name) == "validation"
  for name in re.findall(r"`(\w+)/`", text.split("may also be called")[1]):
    assert name in layouts.IMAGE_NAMES + layouts.MASK_NAMES
