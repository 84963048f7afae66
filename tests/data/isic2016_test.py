import functools
import http.server
import pathlib
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_archives as tiny

from kdseg.data import decode
from kdseg.data import loading
from kdseg.data import masks
from kdseg.data import pairs
from kdseg.data import prepare
from kdseg.data.archives import DataError
from kdseg.data.sets import isic2016

PARTS = tuple(isic2016.ARCHIVES)


def _ids(found: tuple[pairs.Pair, ...]) -> list[str]:
  return [pair.id for pair in found]


def _take(directory: pathlib.Path, **options) -> pairs.Inventory:
  return isic2016.take_inventory(isic2016.find_sources(directory), **options)


def test_splits_hold_every_pair_once_and_the_known_duplicate_nowhere(
  tmp_path, isic
):
  found = _take(isic.write(tmp_path))
  found.check()
  train = _ids(found.splits["train"])
  validation = _ids(found.splits["validation"])
  assert sorted(train + validation) == sorted(
    set(tiny.TRAIN_IDS) - {"ISIC_0001184"}
  )
  assert validation
  assert all(pairs.is_validation(id_) for id_ in validation)
  assert _ids(found.splits["test"]) == list(isic2016.TEST_IDS)
  assert found.excluded == ("ISIC_0001184",)
  assert found.found == {"train": 31, "validation": 31, "test": 379}
  assert "ISIC_0001184 left out of training" in found.notes[-1]


def test_the_known_duplicate_stays_when_asked(tmp_path, isic):
  found = _take(isic.write(tmp_path), duplicates="include")
  everything = found.splits["train"] + found.splits["validation"]
  assert "ISIC_0001184" in _ids(everything)
  assert found.excluded == ()
  assert "kept in training" in found.notes[-1]


def test_archives_and_unpacked_folders_mix(tmp_path, isic):
  packed = _take(isic.write(tmp_path / "zip"))
  mixed = _take(
    isic.write(tmp_path / "mix", unpacked=("train_image", "test_mask"))
  )
  mixed.check()
  assert mixed.stamp == packed.stamp
  for split, found in packed.splits.items():
    assert _ids(mixed.splits[split]) == _ids(found)
    assert [p.mask.read() for p in mixed.splits[split]] == [
      p.mask.read() for p in found
    ]


def test_pairs_match_by_id_in_any_order(tmp_path, isic):
  files = isic.files["train_mask"]
  isic.files["train_mask"] = dict(reversed(files.items()))
  for pair in _take(isic.write(tmp_path)).splits["train"]:
    mask = masks.decode_mask(pair.mask.read(), "")
    np.testing.assert_array_equal(mask, tiny.lesion(int(pair.id[5:])))


def test_part_of_the_training_images_is_enough_and_counted(tmp_path, isic):
  gone = sorted(isic.files["train_image"])[:7]
  for path in gone:
    del isic.files["train_image"][path]
  found = _take(isic.write(tmp_path))
  found.check()
  assert found.found["train"] == 24
  assert "no image" in found.notes[0]
  assert pathlib.Path(gone[0]).stem in found.notes[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_archive_is_named_with_its_address(tmp_path, isic, part):
  directory = isic.write(tmp_path, without=(part,))
  stem = isic2016.ARCHIVES[part]
  with pytest.raises(DataError, match=rf"has no {stem} .*{stem}\.zip into it"):
    isic2016.Isic2016(data_dir=directory).inventory(directory)


def test_a_rar_in_place_of_an_archive_is_named(tmp_path, isic):
  directory = isic.write(tmp_path, without=("test_mask",))
  (directory / f"{isic2016.ARCHIVES['test_mask']}.rar").write_bytes(b"Rar!")
  with pytest.raises(DataError, match="unrar x"):
    isic2016.Isic2016(data_dir=directory).inventory(directory)


@pytest.mark.parametrize(
  ("first", "second"),
  [
    ("train_image", "test_image"),
    ("train_mask", "test_mask"),
    ("train_image", "train_mask"),
  ],
)
def test_swapped_archives_are_named(tmp_path, isic, first, second):
  files = isic.files
  files[first], files[second] = files[second], files[first]
  directory = isic.write(tmp_path)
  with pytest.raises(
    DataError, match=f"{isic2016.ARCHIVES[first]}.* is not .*"
  ):
    _take(directory).check()


def test_an_archive_of_something_else_is_named(tmp_path, isic):
  isic.files["test_image"] = {"cats/cat_1.jpg": b"", "cats/cat_2.jpg": b""}
  with pytest.raises(
    DataError, match=r"Test_Data\.zip is not .*cats/cat_1\.jpg"
  ):
    _take(isic.write(tmp_path)).check()


def test_more_training_images_than_official_are_refused(tmp_path, isic):
  content = next(iter(isic.files["train_image"].values()))
  for number in range(95000, 95900):
    path = isic.path("train_image", f"ISIC_{number:07d}")
    isic.files["train_image"][path] = content
  problems = _take(isic.write(tmp_path)).problems
  assert any("has 931 images" in problem for problem in problems)


@pytest.mark.parametrize("part", ["test_image", "test_mask"])
def test_a_test_set_that_is_not_whole_is_refused_by_id(tmp_path, isic, part):
  del isic.files[part][isic.path(part, "ISIC_0000012")]
  problems = _take(isic.write(tmp_path)).problems
  assert any(
    "lacks 1 of the 379" in problem and "ISIC_0000012" in problem
    for problem in problems
  )


def test_a_training_image_without_mask_is_named(tmp_path, isic):
  del isic.files["train_mask"][isic.path("train_mask", "ISIC_0090003")]
  with pytest.raises(DataError, match=r"ISIC_0090003: no mask in .*Ground"):
    _take(isic.write(tmp_path)).check()


@pytest.mark.parametrize("name", ["ISIC_0090001.png", "notes.csv"])
def test_an_extra_file_is_named(tmp_path, isic, name):
  isic.files["train_image"][f"{isic2016.ARCHIVES['train_image']}/{name}"] = b""
  with pytest.raises(DataError, match=f"do not belong to .*{name}"):
    _take(isic.write(tmp_path)).check()


def test_an_id_that_is_there_twice_is_named(tmp_path, isic):
  isic.files["train_image"]["again/ISIC_0090001.jpg"] = b""
  with pytest.raises(DataError, match=r"ISIC_0090001 twice .*again/"):
    _take(isic.write(tmp_path)).check()


def test_an_unknown_rule_for_duplicates_is_refused():
  with pytest.raises(ValueError, match="duplicates is 'maybe'"):
    isic2016.Isic2016(duplicates="maybe")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, _isic_files) -> pathlib.Path:
  """The data_dir of the tiny archives, prepared once."""
  root = tmp_path_factory.mktemp("isic")
  manual_dir = tiny.IsicParts(_isic_files).write(root / "manual")
  prepare.prepare("isic2016", data_dir=root / "data", manual_dir=manual_dir)
  return root


def test_prepared_records_read_as_a_tfds_data_source(prepared, isic):
  builder = tfds.builder("isic2016", data_dir=prepared / "data")
  source = builder.as_data_source("test")
  assert len(source) == 379
  example = source[3]
  id_ = example["id"].decode()
  assert id_ == isic2016.TEST_IDS[3]
  np.testing.assert_array_equal(
    example["image"],
    decode.decode_image(
      isic.files["test_image"][isic.path("test_image", id_)], ""
    ),
  )
  assert example["mask"].shape == (tiny.HEIGHT, tiny.WIDTH, 1)
  np.testing.assert_array_equal(
    example["mask"][..., 0], tiny.lesion(int(id_[5:])) * np.uint8(255)
  )


def test_prepared_jpegs_keep_their_bytes(prepared, isic):
  builder = tfds.builder("isic2016", data_dir=prepared / "data")
  source = builder.as_data_source(
    "test", decoders={"image": tfds.decode.SkipDecoding()}
  )
  path = isic.path("test_image", isic2016.TEST_IDS[0])
  assert bytes(source[0]["image"]) == isic.files["test_image"][path]


def test_arrays_carry_counts_exclusions_and_native_masks(prepared):
  arrays = loading.load("isic2016", "train", size=6, data_dir=prepared / "data")
  assert arrays.coverage == "31 of 900"
  assert arrays.excluded == ("ISIC_0001184",)
  assert arrays.image.shape == (len(arrays), 6, 6, 3)
  for index, id_ in enumerate(arrays.ids):
    np.testing.assert_array_equal(
      arrays.native_mask(index), tiny.lesion(int(id_[5:]))
    )
  assert arrays.native_size(0) == (tiny.HEIGHT, tiny.WIDTH)


def _train_ids(builder) -> list[bytes]:
  sources = builder.as_data_source()
  return [
    sources[split][index]["id"]
    for split in ("train", "validation")
    for index in range(len(sources[split]))
  ]


def test_records_with_duplicates_lie_apart(prepared):
  kwargs = {"data_dir": prepared / "data", "manual_dir": prepared / "manual"}
  without = prepare.prepare("isic2016", **kwargs)
  with_them = prepare.prepare("isic2016", duplicates="include", **kwargs)
  assert without.data_dir != with_them.data_dir
  assert len(_train_ids(with_them)) == len(_train_ids(without)) + 1


def test_other_archives_than_those_prepared_are_refused(
  prepared, tmp_path, isic
):
  del isic.files["train_image"][isic.path("train_image", "ISIC_0090001")]
  other = isic.write(tmp_path)
  with pytest.raises(DataError, match=r"prepared from other files .*Delete"):
    prepare.prepare("isic2016", data_dir=prepared / "data", manual_dir=other)


FAULTS = {
  "truncated image": (
    "test_image",
    lambda content: content[: len(content) // 2],
    r"Test_Data\.zip: .*ISIC_0000003\.jpg cannot be decoded",
  ),
  "bomb": (
    "test_image",
    lambda _: tiny.encode(np.zeros((10_001, 10_000), bool), "PNG"),
    r"Test_Data\.zip: .*ISIC_0000003\.jpg claims 10000x10001 pixels",
  ),
  "no image": (
    "test_image",
    lambda _: b"<html>404</html>",
    r"ISIC_0000003\.jpg cannot be decoded \(of no known format\)",
  ),
  "mask of another size": (
    "test_mask",
    lambda _: tiny.mask_bytes(tiny.lesion(0, 9, 9)),
    "ISIC_0000003: the mask is 9x9 but the image is 12x8",
  ),
  "grey mask": (
    "test_mask",
    lambda _: tiny.encode(np.full((8, 12), 200, np.uint8), "PNG"),
    r"ISIC_0000003_Segmentation\.png is a mask with grey values",
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_gives_one_error_and_leaves_nothing(tmp_path, isic, fault):
  part, spoil, message = FAULTS[fault]
  path = isic.path(part, "ISIC_0000003")
  isic.files[part][path] = spoil(isic.files[part][path])
  # The training split is written first, so there is something to leave.
  with pytest.raises(DataError, match=message) as caught:
    prepare.prepare(
      "isic2016",
      data_dir=tmp_path / "data",
      manual_dir=isic.write(tmp_path / "manual"),
    )
  assert caught.value.__cause__ is None
  left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
  assert left == []


def test_grey_masks_are_taken_when_asked_and_lie_apart(tmp_path, isic):
  part, spoil, _ = FAULTS["grey mask"]
  path = isic.path(part, "ISIC_0000003")
  isic.files[part][path] = spoil(b"")
  arrays = loading.load(
    "isic2016",
    "test",
    size=8,
    data_dir=tmp_path / "data",
    manual_dir=isic.write(tmp_path / "manual"),
    grey_masks="threshold",
  )
  assert arrays.native_mask(0).all()
  assert not prepare.is_prepared(
    prepare.make_builder("isic2016", data_dir=tmp_path / "data")
  )


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def server(tmp_path, isic, monkeypatch):
  """Serves the archives as the official page does; yields their folder."""
  directory = isic.write(tmp_path / "served")
  handler = functools.partial(_Quiet, directory=str(directory))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{running.server_address[1]}/"
    monkeypatch.setattr(isic2016, "URL", address)
    yield directory
    running.shutdown()
    thread.join()


def test_archives_are_downloaded(tmp_path, server):
  data_dir = tmp_path / "data"
  arrays = loading.load("isic2016", "test", size=8, data_dir=data_dir)
  assert len(arrays) == 379


def test_no_network_says_what_to_fetch_by_hand(tmp_path):
  def download(urls):
    raise ConnectionError("unreachable")

  builder = isic2016.Isic2016(data_dir=tmp_path)
  with pytest.raises(DataError, match=r"unreachable.*Test_Data\.zip.*manual"):
    builder.inventory(None, download)


def test_a_named_folder_without_archives_is_never_made_up_for(tmp_path):
  manual_dir = tmp_path / "manual"
  manual_dir.mkdir()
  (manual_dir / "holiday.jpg").write_bytes(b"")
  with pytest.raises(DataError, match="has no ISBI2016_ISIC_Part1_Training_D"):
    prepare.prepare(
      "isic2016", data_dir=tmp_path / "data", manual_dir=manual_dir
    )


def test_a_manual_dir_that_is_not_there_is_named(tmp_path):
  with pytest.raises(DataError, match="nowhere is no folder"):
    prepare.prepare(
      "isic2016", data_dir=tmp_path, manual_dir=tmp_path / "nowhere"
    )


@pytest.mark.parametrize("part", PARTS)
def test_an_empty_archive_is_named(tmp_path, isic, part):
  isic.files[part] = {}
  with pytest.raises(
    DataError, match=rf"{isic2016.ARCHIVES[part]}\.zip is not .*but nothing"
  ):
    _take(isic.write(tmp_path)).check()
