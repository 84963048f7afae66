import re

import pytest

from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.archives import File


def _file(path: str, size: int = 1) -> File:
  return File(path, "A.zip", f"A.zip: {path}", size, lambda: b".")


def _sorted(*paths: str) -> pairs.Sorted:
  find_id = pairs.id_in_name(re.compile(r"(\w+)\.png"))
  return pairs.sort_by_id(map(_file, paths), find_id)


def test_files_are_sorted_by_the_id_in_their_name():
  found = _sorted("x/a.png", "notes.txt", "b.png", "y/A.png")
  assert {id_: file.path for id_, file in found.files.items()} == {
    "A": "x/a.png",
    "B": "b.png",
  }
  assert found.strangers == ["notes.txt"]
  assert found.problems == ["A.zip has A twice (x/a.png, y/A.png); keep one."]


def test_ids_are_composed_however_a_disk_writes_their_letters():
  files = [_file("la\u0308sion.png"), _file("l\xe4sion.png")]
  found = pairs.sort_by_id(files, lambda file: file.name[:-4])
  assert list(found.files) == ["l\xe4sion"]
  assert len(found.problems) == 1


def test_pairs_are_matched_by_id_and_the_lonely_named():
  images, masks = (
    _sorted("c.png", "a.png").files,
    _sorted("b.png", "a.png").files,
  )
  matched, unmasked, unpictured = pairs.match(images, masks)
  assert [(p.id, p.image, p.mask) for p in matched] == [
    ("A", images["A"], masks["A"])
  ]
  assert unmasked[0].startswith("C: no mask in A.zip for 1 of 2 images.")
  assert unpictured[0].startswith("B: no image in A.zip for 1 of 2 masks.")


def test_a_release_that_is_not_whole_or_another_is_named():
  problems = pairs.compare_with_release(
    "mask", _sorted("a.png", "x.png").files, ["A", "B", "C"], "PH2"
  )
  assert "has 1 masks that are not in PH2: X." in problems[0]
  assert "lacks 2 of the 3 masks of PH2: B, C." in problems[1]
  whole = _sorted("a.png").files
  assert pairs.compare_with_release("mask", whole, ["A"], "PH2") == []


def test_an_inventory_counts_and_stamps_its_pairs_unless_told():
  def take(size: int, **changes) -> pairs.Inventory:
    pair = pairs.Pair("a", _file("a.jpg"), _file("a.png", size))
    return pairs.Inventory({"train": (), "test": (pair,)}, **changes)

  assert dict(take(1).splits) == {"test": take(1).splits["test"]}
  assert take(1).found == {"test": 1}
  assert take(1, found={"test": 5}).found == {"test": 5}
  assert take(1).stamp == take(1).stamp != take(2).stamp
  assert take(1, stamp="x").stamp == "x"


def test_one_id_in_ten_is_held_out_and_always_the_same():
  ids = [f"ISIC_{n:07d}" for n in range(5000)]
  held_out = [id_ for id_ in ids if pairs.is_validation(id_)]
  # Binomial: 500 expected, deviation 21.
  assert 430 < len(held_out) < 570
  # Worked out with `sha256sum`, so that no release moves an image.
  assert pairs.is_validation("ISIC_0000017")
  assert not pairs.is_validation("ISIC_0000000")


def test_the_first_problem_is_raised_and_the_others_counted():
  inventory = pairs.Inventory({}, problems=("first", "second", "third"))
  with pytest.raises(DataError, match=r"^first \(2 more"):
    inventory.check()
  pairs.Inventory({}).check()


def test_listing_counts_what_it_does_not_show():
  assert pairs.listing("abcdefg", limit=3) == "a, b, c and 4 more"
  assert pairs.listing("ab") == "a, b"
