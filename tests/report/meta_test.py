"""report.json: the protocol line, and the joining of several."""

import pytest
from tiny_scores import FAST
from tiny_scores import NONE
from tiny_scores import make_arm
from tiny_scores import make_rows

from kdseg.report import meta
from kdseg.report import summary

PROTOCOL = {
  "train": {"name": "isic2016_train", "found": 751, "official": 900},
  "datasets": {"isic2016_test": {"found": 60, "official": 379}},
  "protocol": {
    "resolution": 192,
    "threshold": 0.5,
    "interpolation": "bilinear",
    "test_time_augmentation": "flips",
    "checkpoint": "best validation Dice",
  },
}


class TestProtocolLine:
  def line(self, meta, rows=None):
    rows = rows or make_arm(NONE, 0.89)
    return summary.summarize(rows, {**FAST, **meta}).protocol["isic2016_test"]

  @pytest.mark.parametrize(
    "words",
    [
      "isic2016_test, n = 60 of 379 (a subset)",
      "trained on isic2016_train, 751 of 900 (a subset)",
      "network input 192 x 192",
      "each image's own size (256 x 256)",
      "lesion where p > 0.5",
      "mean over images, then mean over seeds",
      "probabilities resized: bilinear",
      "test-time augmentation: flips",
      "checkpoint: best validation Dice",
    ],
  )
  def test_stamps(self, words):
    assert words in self.line(PROTOCOL)

  def test_a_whole_set_is_no_subset(self):
    line = self.line({"train": {"found": 900, "official": 900}})
    assert "900 of 900;" in line

  def test_says_what_was_not_stated(self):
    assert self.line({}).count("not stated") == 7

  def test_shows_the_smallest_and_the_largest_size(self):
    rows = make_rows(NONE, [0.8, 0.9, 0.7])
    for row, (height, width) in zip(rows, [(30, 40), (576, 767), (100, 9)]):
      row["height"], row["width"] = height, width
    assert "(100 x 9 to 576 x 767)" in self.line({}, rows)


class TestMergeMeta:
  def test_joins_reports_that_agree(self):
    one = {"arms": {"a": {"parameters": 1}}, "notes": ["x"], "teacher": "t"}
    other = {"arms": {"b": {"parameters": 2}}, "notes": ["x", "y"]}
    assert meta.merge([one, other]) == {
      "arms": {"a": {"parameters": 1}, "b": {"parameters": 2}},
      "notes": ["x", "y"],
      "teacher": "t",
    }

  @pytest.mark.parametrize("order", [1, -1])
  def test_an_untrained_teacher_gives_way_to_that_of_another_folder(
    self, order
  ):
    metas = [{"teacher": "t"}, {"teacher": ""}, {"notes": []}, {"teacher": "t"}]
    assert meta.merge(metas[::order])["teacher"] == "t"
    assert meta.merge([{"teacher": ""}] * 2)["teacher"] == ""

  def test_leaves_its_arguments_alone(self):
    one = {"arms": {"a": {"parameters": 1}}, "notes": ["x"]}
    meta.merge([one, {"arms": {"b": {}}, "notes": ["y"]}])
    assert one == {"arms": {"a": {"parameters": 1}}, "notes": ["x"]}

  @pytest.mark.parametrize(
    ("one", "other", "where"),
    [
      (
        {"protocol": {"resolution": 256}},
        {"protocol": {"resolution": 192}},
        "protocol.resolution: 256 and 192",
      ),
      (
        {"arms": {"a": {"parameters": 1}}},
        {"arms": {"a": {"parameters": 2}}},
        "arms.a.parameters",
      ),
      ({"teacher": "a"}, {"teacher": "b"}, "teacher: 'a' and 'b'"),
      ({"groups": {"g": ["1"]}}, {"groups": {"g": ["2"]}}, "groups.g"),
    ],
  )
  def test_two_protocols_do_not_share_a_line(self, one, other, where):
    with pytest.raises(ValueError, match=where):
      meta.merge([one, other])
