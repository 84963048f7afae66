import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_archives as tiny

from kdseg.data import masks
from kdseg.data import prepare
from kdseg.data.archives import DataError
from kdseg.data.sets import ph2

# The head of the file that comes with the data, cut to its first columns.
TABLE = """
||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry ||
|| IMD002 ||                        ||          0         ||     0     ||
|| IMD004 ||                        ||          1         ||     2     ||
|| IMD058 || Melanoma               ||          2         ||     2     ||

Legends:
Clinical Diagnosis:
    0 - Common Nevus;
    1 - Atypical Nevus;
    2 - Melanoma.
"""


def _root(id_: str) -> str:
  return f"PH2Dataset/PH2 Dataset images/{id_}"


def _lesion(id_: str) -> str:
  return f"{_root(id_)}/{id_}_lesion/{id_}_lesion.bmp"


def _image(id_: str) -> str:
  return f"{_root(id_)}/{id_}_Dermoscopic_Image/{id_}.bmp"


def test_all_200_pairs_are_one_split(tmp_path, ph2_files):
  found = ph2.take_inventory(
    tiny.write_zip(tmp_path / "PH2Dataset.zip", ph2_files)
  )
  found.check()
  assert [pair.id for pair in found.splits["test"]] == list(ph2.IDS)
  assert list(found.splits) == ["test"]
  assert found.found == ph2.Ph2.official_counts == {"test": 200}
  for pair in found.splits["test"]:
    mask = masks.decode_mask(pair.mask.read(), "")
    np.testing.assert_array_equal(mask, tiny.lesion(int(pair.id[3:])))


@pytest.mark.parametrize("inside", ["", "PH2Dataset", "PH2Dataset/.."])
def test_the_unpacked_folder_is_found_from_above_and_from_within(
  tmp_path, ph2_files, inside
):
  tiny.write_folder(tmp_path, ph2_files)
  found = ph2.Ph2(data_dir=tmp_path).inventory(tmp_path / inside)
  found.check()
  assert len(found.splits["test"]) == 200


def test_diagnoses_come_with_the_table(tmp_path, ph2_files):
  ph2_files["PH2Dataset/PH2_dataset.txt"] = TABLE.encode()
  found = ph2.take_inventory(
    tiny.write_zip(tmp_path / "PH2Dataset.zip", ph2_files)
  )
  diagnoses = {pair.id: pair.diagnosis for pair in found.splits["test"]}
  assert diagnoses["IMD002"] == "common_nevus"
  assert diagnoses["IMD004"] == "atypical_nevus"
  assert diagnoses["IMD058"] == "melanoma"
  assert diagnoses["IMD003"] == ""
  assert found.notes == ("3 of 200 images have a diagnosis.",)


def test_what_else_the_whole_archive_holds_is_no_fault(tmp_path, ph2_files):
  ph2_files |= {
    f"{_root('IMD002')}/IMD002_roi/IMD002_R1_Label3.bmp": b"",
    f"{_root('IMD002')}/IMD002_roi/IMD002_lesion.bmp": b"",
    "PH2Dataset/PH2_dataset.xlsx": b"",
    "PH2Dataset/Readme.txt": b"",
    "PH2Dataset/PH2 manual.pdf": b"",
  }
  found = ph2.take_inventory(tiny.write_folder(tmp_path, ph2_files))
  found.check()
  assert all("_roi" not in pair.mask.path for pair in found.splits["test"])


def test_records_keep_pixels_diagnosis_and_odd_masks(tmp_path, ph2_files):
  ph2_files["PH2Dataset/PH2_dataset.txt"] = TABLE.encode()
  wide = np.repeat(tiny.lesion(2)[..., None], 3, -1).astype(np.uint8) * 255
  ph2_files[_lesion("IMD002")] = tiny.encode(wide, "BMP")
  tiny.write_zip(tmp_path / "PH2Dataset.zip", ph2_files)
  prepare.prepare("ph2", data_dir=tmp_path / "data", manual_dir=tmp_path)
  source = tfds.builder("ph2", data_dir=tmp_path / "data").as_data_source(
    "test"
  )
  assert len(source) == 200
  np.testing.assert_array_equal(source[0]["image"], tiny.picture(2))
  np.testing.assert_array_equal(
    source[0]["mask"][..., 0], tiny.lesion(2) * np.uint8(255)
  )
  assert source[0]["diagnosis"] == b"common_nevus"
  assert source[1]["diagnosis"] == b""


def test_the_rar_as_it_is_downloaded_is_refused_with_the_command(tmp_path):
  (tmp_path / "PH2Dataset.rar").write_bytes(b"Rar!")
  with pytest.raises(DataError, match=r"unrar x '.*PH2Dataset\.rar'"):
    ph2.Ph2(data_dir=tmp_path).inventory(tmp_path)


def test_an_empty_folder_says_where_ph2_comes_from(tmp_path):
  with pytest.raises(DataError, match=r"has no PH2Dataset.*fc\.up\.pt"):
    ph2.Ph2(data_dir=tmp_path).inventory(tmp_path)


def test_without_manual_dir_it_says_what_to_download(tmp_path):
  with pytest.raises(DataError, match=r"PH2Dataset\.rar from https"):
    prepare.prepare("ph2", data_dir=tmp_path)


def test_another_archive_under_the_name_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "PH2Dataset.zip", {"cats/cat.bmp": b""})
  with pytest.raises(DataError, match=r"PH2Dataset\.zip is not PH2.*cat\.bmp"):
    ph2.take_inventory(path).check()


@pytest.mark.parametrize(
  ("path", "kind"), [(_image("IMD045"), "image"), (_lesion("IMD045"), "mask")]
)
def test_a_missing_file_is_named_by_id(tmp_path, ph2_files, path, kind):
  del ph2_files[path]
  with pytest.raises(
    DataError, match=f"lacks 1 of the 200 {kind}s of PH2: IMD045"
  ):
    ph2.take_inventory(tiny.write_folder(tmp_path, ph2_files)).check()


@pytest.mark.parametrize(
  "path", ["PH2Dataset/extra.bmp", "PH2Dataset/IMD002/IMD002_lesion.png"]
)
def test_an_extra_file_is_named(tmp_path, ph2_files, path):
  ph2_files[path] = b""
  with pytest.raises(DataError, match=f"do not belong to PH2: {path}"):
    ph2.take_inventory(tiny.write_zip(tmp_path / "a.zip", ph2_files)).check()


def test_a_foreign_id_and_a_double_one_are_named(tmp_path, ph2_files):
  ph2_files[_image("IMD001")] = b""
  ph2_files["PH2Dataset/again/IMD002.bmp"] = b""
  problems = ph2.take_inventory(
    tiny.write_zip(tmp_path / "a.zip", ph2_files)
  ).problems
  assert any(
    "1 images that are not in PH2: IMD001" in problem for problem in problems
  )
  assert any("IMD002 twice" in problem for problem in problems)
