"""The data sets there are, and one that a user adds in a file of their own."""

import importlib.util

import numpy as np
import pytest
import tiny_archives as tiny
import tiny_run

from kdseg.data import __main__ as command
from kdseg.data import loading
from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data import verify
from kdseg.data.archives import DataError
from kdseg.distill import extensions
from kdseg.experiment import config as config_lib
from kdseg.experiment import splits

# All that a data set needs; what else there is, has defaults.
SOURCE = """
import re

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import pairs


class Clinic(builder.PairBuilder):
  name = test_name = "clinic"
  title = "pictures of one clinic"

  def inventory(self, manual_dir, download=None):
    files = archives.list_files(self.require(manual_dir))
    find_id = pairs.id_in_name
    images = pairs.sort_by_id(files, find_id(re.compile(r"(\\w+)\\.jpg")))
    masks = pairs.sort_by_id(files, find_id(re.compile(r"(\\w+)\\.png")))
    matched, unmasked, unpictured = pairs.match(images.files, masks.files)
    return pairs.Inventory(
      splits={"train": matched[2:], "validation": matched[1:2],
              "test": matched[:1]},
      problems=(*unmasked, *unpictured),
    )
"""


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
  path = tmp_path_factory.mktemp("own") / "clinic.py"
  path.write_text(SOURCE)
  spec = importlib.util.spec_from_file_location("clinic", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {**sets.BUILDERS, "clinic": module.Clinic}


def _write(directory, names):
  for seed, name in enumerate(names):
    files = {
      f"images/{name}.jpg": tiny.encode(tiny.picture(seed), "JPEG"),
      f"masks/{name}.png": tiny.mask_bytes(tiny.lesion(seed)),
    }
    tiny.write_folder(directory, files)
  return directory


def test_a_users_builder_is_prepared_and_loaded_like_any_other(
  tmp_path, builders
):
  kwargs = {
    "size": 8,
    "data_dir": tmp_path / "data",
    "manual_dir": _write(tmp_path / "own", "abcd"),
    "builders": builders,
  }
  arrays = loading.load("clinic", "train", **kwargs)
  assert (arrays.name, arrays.ids) == ("clinic", ("C", "D"))
  assert arrays.coverage == "2 of 2"
  np.testing.assert_array_equal(arrays.native_mask(1), tiny.lesion(3))
  with pytest.raises(DataError, match="clinic: Pass the folder of its files"):
    loading.load("clinic", "train", size=8, data_dir=tmp_path / "none",
                 builders=builders)  # fmt: skip
  # From now on without the files; with others, it is refused.
  del kwargs["manual_dir"]
  again = loading.load("clinic", "train", **kwargs)
  assert loading.fingerprint(again) == loading.fingerprint(arrays)
  kwargs["manual_dir"] = _write(tmp_path / "other", "abcde")
  with pytest.raises(DataError, match="prepared from other files"):
    loading.load("clinic", "train", **kwargs)


def test_a_users_builder_is_verified_by_name(tmp_path, builders, capsys):
  own = _write(tmp_path, "abcd")
  arguments = ["verify", "clinic", "--manual-dir", str(own)]
  assert command.main(arguments, builders) == 0
  (own / "masks" / "b.png").unlink()
  assert command.main(arguments, builders) == 1
  assert "B: no mask in" in capsys.readouterr().out
  with pytest.raises(ValueError, match='unknown data set "clinic"'):
    verify.verify("clinic", manual_dir=own)


@pytest.mark.parametrize("name", sets.BUILDERS)
def test_a_data_set_says_what_it_is(name):
  builder = sets.BUILDERS[name]
  assert builder.name == name
  assert all((builder.title, builder.terms_of_use, builder.__doc__))
  assert builder.official == bool(builder.official_counts)
  tests = [b.test_name for b in sets.BUILDERS.values()]
  assert tests.count(builder.test_name) == 1


def test_only_official_sets_are_found_in_a_folder(tmp_path, isic, ph2_files):
  isic.write(tmp_path)
  ph2 = tiny.write_zip(tmp_path / "PH2Dataset.zip", ph2_files)
  found = {
    name: builder.find_sources(tmp_path)
    for name, builder in sets.BUILDERS.items()
  }
  assert found["ph2"] == (ph2,)
  assert len(found["isic2016"]) == 4
  assert found["synthetic"] == found["folder"] == ()
  assert prepare.make_builder("ph2", data_dir=tmp_path).official


def test_an_experiment_reads_a_users_builder_from_its_extensions(
  tmp_path, builders
):
  config = tiny_run.make_config(tmp_path / "data")
  config.data.name, config.data.tests = "clinic", ("clinic",)
  config.data.manual_dir = str(_write(tmp_path / "own", "abcd"))
  own = extensions.Extensions(data_sets={"clinic": builders["clinic"]})
  read = splits.load(config_lib.parse(config, own).data)
  assert read.train.ids == ("C", "D")
  assert [*read.tests] == ["clinic"]
  with pytest.raises(ValueError, match='unknown data set "clinic"'):
    config_lib.parse(config, extensions.Extensions())
