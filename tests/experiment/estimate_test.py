import jax
import numpy as np
import pytest
from tiny_run import FROZEN
from tiny_run import make_config

from kdseg.experiment import estimate
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def config(folder):
  return make_config(
    folder / "data",
    teachers={"teacher_vit": FROZEN},
    distil_from=("teacher_vit",),
    precompute_teacher=True,
    arms={"patch_unet": {"methods": ("none", "mbf"), "seeds": (0, 1, 2)}},
  )


@pytest.fixture(scope="module")
def items(config, folder):
  return estimate.estimate(config, folder / "run", repeats=1)


def counts(items):
  return {item.what: item.count for item in items}


def test_counts_every_kind_of_work_once(items):
  # 24 images to train on, 8 to validate, 6 to test; batches and passes of 8.
  assert counts(items) == {
    "teacher_vit: encoding, passes of 8": 8 * 3,
    "teacher_vit: steps of 8": 3,
    "teacher_vit: validation, passes of 8": 1,
    "teacher_vit: outputs, passes of 8": 8 * 3,
    "teacher_vit: scoring, passes of 8": 1,
    "patch_unet-none x 3: steps of 8": 3 * 6,
    "patch_unet-none x 3: validation, passes of 8": 3 * 2,
    "patch_unet-none: scoring, passes of 8": 3,
    "patch_unet-mbf x 3: steps of 8": 3 * 6,
    "patch_unet-mbf x 3: validation, passes of 8": 3 * 2,
    "patch_unet-mbf: scoring, passes of 8": 3,
  }


def test_every_kind_took_its_time(items):
  assert all(0 < item.seconds < 60 for item in items)


@pytest.mark.parametrize(
  ("measured", "said"),
  [
    (0, r"^teacher_vit: passes of 8: .* lower evaluation\.batch_size"),
    (1, r"^teacher_vit: training 1 network .* lower data\.batch_size"),
  ],
)
def test_too_little_memory_names_what_to_lower(
  config, folder, monkeypatch, measured, said
):
  times = iter([1.0] * measured)

  def median(function, repeats):
    for seconds in times:
      return seconds
    raise MemoryError

  monkeypatch.setattr(estimate, "_median", median)
  with pytest.raises(memory.OutOfMemoryError, match=said):
    estimate.estimate(config, folder / "run")


def test_leaves_the_workdir_as_it_is(items, folder):
  assert not (folder / "run").exists()


def test_what_is_there_already_is_not_counted(config, folder, monkeypatch):
  monkeypatch.setattr(estimate, "_median", lambda function, repeats: 1.0)
  workdir = folder / "half"
  arrays = {"params": {"x": np.zeros(1)}}
  checkpoint.save_variables(workdir / "teachers" / "teacher_vit", arrays, {})
  for seed in (0, 1, 2):
    name = f"patch_unet-none-seed{seed}"
    checkpoint.save_variables(workdir / "arms" / name, arrays, {})
  failed = workdir / "arms" / "patch_unet-mbf-seed0" / "failed.json"
  failed.parent.mkdir(parents=True)
  failed.write_text("{}")
  row = dict.fromkeys(scores_lib.COLUMNS, 0)
  row |= {"arm": "teacher_vit", "seed": 0, "dataset": "synthetic_test"}
  scores_lib.write(
    workdir / "scores.csv", [row | {"id": f"test_{i:05d}"} for i in range(6)]
  )
  found = counts(estimate.estimate(config, workdir, repeats=1))
  assert found == {
    # What its frozen blocks give is read again for its outputs.
    "teacher_vit: encoding, passes of 8": 8 * 3,
    "teacher_vit: outputs, passes of 8": 8 * 3,
    "patch_unet-none: scoring, passes of 8": 3,
    "patch_unet-mbf x 2: steps of 8": 2 * 6,
    "patch_unet-mbf x 2: validation, passes of 8": 2 * 2,
    "patch_unet-mbf: scoring, passes of 8": 2,
  }


def test_seeds_of_one_program_cost_what_that_takes(config, folder, monkeypatch):
  config = config.copy_and_resolve_references()
  config.seeds_at_once = 2
  config.arms.patch_unet = {"methods": ("none",), "seeds": (0, 1, 2)}
  monkeypatch.setattr(estimate, "_median", lambda function, repeats: 1.0)
  items = estimate.estimate(config, folder / "run", repeats=1)
  [item] = [i for i in items if i.what == "patch_unet-none x 3: steps of 8"]
  # Six steps, each a program of two and one of one.
  assert item.total == pytest.approx(6 * 2.0)


@pytest.mark.long
def test_a_method_that_normalises_by_the_teacher_is_timed_too(config, folder):
  config = config.copy_and_resolve_references()
  config.methods.std = {
    "terms": {"fitnet": 1.0},
    "taps": ("decoder_low",),
    "normalise": "std",
  }
  config.arms.patch_unet = {"methods": ("std",), "seeds": (0,)}
  found = counts(estimate.estimate(config, folder / "run", repeats=1))
  assert found["patch_unet-std x 1: steps of 8"] == 6


def test_the_table_adds_up():
  items = [estimate.Item("a", 100, 0.5), estimate.Item("bb", 3, 20.0)]
  text = estimate.format_items(items)
  assert text.splitlines()[0] == "a       100 x    0.500 s =     50s"
  assert "About 1m50s" in text


def test_nothing_left_is_said_too():
  assert "About 0s" in estimate.format_items([])


def test_the_median_leaves_out_the_first_call(monkeypatch):
  clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
  monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
  calls = []
  assert (
    estimate._median(lambda: calls.append(1) or jax.numpy.ones(1), 3) == 2.0
  )
  assert len(calls) == 4
