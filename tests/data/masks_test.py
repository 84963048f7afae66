"""Classes, palettes, inverted masks, and the flags that messages give."""

import re

from absl import flags as absl_flags
import ml_collections
from ml_collections import config_flags
import numpy as np
from PIL import Image
import pytest
import tiny_archives as tiny

from kdseg.data import __main__ as command
from kdseg.data import loading
from kdseg.data import masks
from kdseg.data.archives import DataError

CLASSES = np.array([[0, 1, 2, 3], [0, 0, 2, 2]], np.uint8)


def _png(array):
  return tiny.encode(array, "PNG")


def _palette(colours):
  image = Image.fromarray(CLASSES, "P")
  image.putpalette(colours)
  return image


@pytest.fixture(params=["grey", "palette"])
def classes(request, tmp_path):
  """A mask of classes 0 to 3, as labelling tools write it."""
  if request.param == "grey":
    return _png(CLASSES)
  path = tmp_path / "classes.png"
  _palette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]).save(path)
  return path.read_bytes()


@pytest.mark.parametrize("grey", ["error", "threshold"])
def test_classes_are_refused_with_both_remedies(classes, grey):
  with pytest.raises(
    DataError,
    match=r"here is a mask of classes: its values are 0, 1, 2, 3\."
    r".*folder\.lesion=any .*--option lesion=any.*folder\.lesion=3 ",
  ):
    masks.decode_mask(classes, "here", masks.MaskRule(grey))


@pytest.mark.parametrize(
  ("lesion", "expected"), [("any", CLASSES > 0), ("2", CLASSES == 2)]
)
def test_any_class_or_one_is_lesion_when_asked(classes, lesion, expected):
  found = masks.decode_mask(classes, "", masks.MaskRule(lesion=lesion))
  np.testing.assert_array_equal(found, expected)


def test_classes_with_a_value_to_ignore_are_no_grey_values():
  content = _png(np.array([[0, 1, 2, 255]], np.uint8))
  with pytest.raises(DataError, match=r"values are 0, 1, 2, 255\. .*lesion=2 "):
    masks.decode_mask(content, "here", masks.MaskRule("threshold"))


def test_a_palette_whose_first_colour_is_not_black_is_refused(tmp_path):
  path = tmp_path / "a.png"
  _palette([9, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]).save(path)
  with pytest.raises(DataError, match="has colours"):
    masks.decode_mask(path.read_bytes(), "a", masks.MaskRule(lesion="any"))


@pytest.mark.parametrize("lesion", ["any", "2"])
def test_grey_values_are_no_classes(lesion):
  content = _png(np.array([[0, 2, 99]], np.uint8))
  with pytest.raises(DataError, match="here has the value 99"):
    masks.decode_mask(content, "here", masks.MaskRule(lesion=lesion))


@pytest.mark.parametrize("values", [(0, 255), (0, 1)])
def test_an_inverted_mask_has_its_lesion_at_0(values):
  content = _png(np.array([values], np.uint8))
  found = masks.decode_mask(content, "", masks.MaskRule(lesion="black"))
  np.testing.assert_array_equal(found, [[True, False]])


@pytest.mark.parametrize("lesion", ["red", "0", "256", "-1", "²"])
def test_an_unknown_rule_for_lesions_is_refused(lesion):
  with pytest.raises(ValueError, match=f"lesion is '{lesion}'"):
    masks.decode_mask(_png(CLASSES), "", masks.MaskRule(lesion=lesion))


# The flags of messages, as a user copies them.


def set_by_flags(config: str, flags: list[str]) -> ml_collections.ConfigDict:
  """Returns a config file's values as flags behind it change them."""
  values = absl_flags.FlagValues()
  line = ["program", f"--config={config}", *flags]
  config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=line, lock_config=True
  )
  values(line)
  return values.config


# ml_collections loads a config file by a way that Python gives up.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shipped", ["quickstart", "isic2016", "isic2016_full"])
@pytest.mark.parametrize("fault", ["classes", "grey"])
def test_the_flags_of_a_message_work_in_a_run_and_in_kdseg_data(
  tmp_path, shipped, fault
):
  values = {"classes": [0, 0, 1, 2], "grey": [0, 9, 99, 255]}[fault]
  mask = np.resize(np.array(values, np.uint8), (tiny.HEIGHT, tiny.WIDTH))
  own = tmp_path / "own"
  tiny.write_folder(
    own / "train",
    {"images/a.png": _png(tiny.picture(0)), "masks/a.png": _png(mask)},
  )
  where = {"data_dir": tmp_path / "data", "manual_dir": own}
  with pytest.raises(DataError) as error:
    loading.load("folder", "train", size=32, **where)
  for flag in re.findall(r"--config\.[^\s,;]+", str(error.value)):
    config = set_by_flags(f"configs/{shipped}.py", [flag])
    options = config.data.options.to_dict()["folder"]
    loading.load("folder", "train", size=32, **where, **options)
  option = re.findall(r"--option [^\s,;)]+", str(error.value))[0].split()
  arguments = ["prepare", "folder", "--manual-dir", str(own)]
  arguments += ["--data-dir", str(tmp_path / "data2"), *option]
  assert command.main(arguments) == 0
