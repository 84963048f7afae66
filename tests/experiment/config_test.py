import re
import shlex

from absl import flags
from ml_collections import config_flags
import pytest
from tiny_run import TEACHER
from tiny_run import make_config

from kdseg.data.sets.folder import Folder
from kdseg.distill import extensions as extensions_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import run


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"distil_from": ()}, 'method "mbf" has terms, which need a teacher'),
    (
      {"methods": {"none": {}, "mbf": {"terms": {"kd": 1.0},
                                       "teacher_out": "shuffled"}, "boom": {}},
       "data": 4},
      "shuffles the teacher.s outputs, which takes two images a device",
    ),
    ({"seeds_at_once": -1}, "seeds_at_once must be 0 or more: -1"),
    ({"mapping": "vmap"}, 'mapping "vmap"'),
    ({"seeds_at_once": 2.0}, "a value is of another kind than it has to be"),
    (
      {"teachers": {"teacher_unet": {**TEACHER, "precompute": True}}},
      "teacher_unet.precompute: this network has no frozen block",
    ),
  ],
)  # fmt: skip
def test_what_would_fail_after_hours_fails_at_once(change, message, data_dir):
  size = change.pop("data", None)
  config = make_config(data_dir, **change)
  if size:
    config.data.batch_size = size
  with pytest.raises(ValueError, match=message):
    config_lib.parse(config)


@pytest.mark.parametrize(
  "extensions",
  [
    extensions_lib.Extensions(terms={"fitnet": None}),
    extensions_lib.Extensions(terms={"loss": None}),
    extensions_lib.Extensions(regions={"all": None}),
    extensions_lib.Extensions(students={"enet": None}),
    extensions_lib.Extensions(data_sets={"ph2": None}),
  ],
)
def test_a_name_that_is_taken_is_refused(extensions, data_dir):
  with pytest.raises(ValueError, match="is taken; choose another"):
    config_lib.parse(make_config(data_dir), extensions)


def test_a_data_set_that_a_user_adds_is_named_like_any_other(data_dir):
  class Mine(Folder):
    name, test_name = "mine", "mine_test"

  config = make_config(data_dir)
  config.data.name, config.data.tests = "mine", ("mine", "validation")
  with pytest.raises(ValueError, match='data set "mine"'):
    config_lib.parse(config)
  data = config_lib.parse(
    config, extensions_lib.Extensions(data_sets={"mine": Mine})
  ).data
  assert [data.test_name(test) for test in data.tests] == [
    "mine_test",
    "mine_validation",
  ]


def test_a_primary_family_of_unknown_methods_is_refused(data_dir):
  config = make_config(data_dir)
  config.primary = (("mbf", ("none", "kdd")),)
  with pytest.raises(ValueError, match='method in primary "kdd"'):
    config_lib.parse(config)


def test_a_taught_average_that_nothing_computes_is_refused(data_dir):
  config = make_config(data_dir, teacher_out_tta="dihedral")
  with pytest.raises(ValueError, match="precompute_teacher"):
    config_lib.parse(config)


@pytest.mark.parametrize(
  ("changes", "drawn"),
  [
    ({}, False),
    ({"training": {"epochs": 0.0, "learning_rate": 1.0}}, True),
    (
      {
        "training": {"epochs": 0.0, "learning_rate": 1.0},
        "checkpoint": "runs/old/teachers/teacher_unet",
      },
      False,
    ),
  ],
)
def test_a_teacher_from_a_file_was_trained_there(changes, drawn, data_dir):
  teacher = {"teacher_x": {**TEACHER, **changes}}
  config = make_config(data_dir, teachers=teacher, distil_from=("teacher_x",))
  assert config_lib.parse(config).teachers["teacher_x"].is_random is drawn


def test_arms_are_planned_seed_by_seed(data_dir):
  arms = {"enet": {"methods": ("none", "mbf"), "seeds": (1, 0)}}
  config = config_lib.parse(make_config(data_dir, arms=arms))
  assert [arm_id.key for arm_id in config.arms] == [
    "enet-none-seed0",
    "enet-mbf-seed0",
    "enet-none-seed1",
    "enet-mbf-seed1",
  ]


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_a_batch_that_the_devices_cannot_share_is_refused(part, data_dir):
  config = make_config(data_dir)
  config[part].batch_size = 6
  with pytest.raises(ValueError, match=rf"{part}\.batch_size is 6.*devices, 4"):
    config_lib.parse(config)


def options(**changes):
  return {**TEACHER, **changes}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"arms": {"enet": {"methods": ("mbff",), "seeds": (0,)}}},
      'unknown method of arms.enet "mbff"; did you mean "mbf".*boom',
    ),
    ({"methods": {"none": {}, "mbf": {"term": 1}, "boom": {}}}, '"term"'),
    ({"teachers": {"unet": TEACHER}}, 'call it "teacher_unet"'),
    ({"distil_from": ("teacher_vit",)}, 'in distil_from "teacher_vit"'),
    ({"training": {"epoch": 1.0}}, 'did you mean "training.epochs"'),
    ({"students": {"patch_unet": {"width": 3}}}, "patch_unet.*width"),
    ({"students": {"patch_unett": {}}}, 'did you mean "patch_unet"'),
    ({"teachers": {"teacher_unet": options(network="unet")}}, '"unet"'),
    (
      {
        "teachers": {"teacher_unet": options(training={"epochs": 1.0, "lr": 1})}
      },
      r'"teachers\.teacher_unet\.training\.lr"',
    ),
    ({"augment": {"rotation": 3.0}}, 'did you mean "rotate"'),
    ({"segmentation": {"bcee": 1.0}}, "bcee"),
    (
      {"arms": {"patch_unet": {"methods": ("none",), "seeds": (0, 1, 0)}}},
      "arms.patch_unet.seeds has 0 twice",
    ),
    (
      {"arms": {"patch_unet": {"methods": ("none", "none"), "seeds": (0,)}}},
      "arms.patch_unet.methods has 'none' twice",
    ),
    (
      {"arms": {"my-net": {"methods": ("none",), "seeds": (0,)}}},
      'arms.my-net: the name of a student has no "-"',
    ),
    (
      {"arms": {"teacher_x": {"methods": ("none",), "seeds": (0,)}}},
      'does not begin with "teacher"',
    ),
    *(
      (
        {"training": {"epochs": 1.0, "learning_rate": 1e-2, **wrong}},
        message,
      )
      for wrong, message in (
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"schedule": "cosin"}, "schedule must be one of"),
        ({"on_non_finite": "ignore"}, "'ignore'"),
        ({"warmup": 1.0}, "warmup is the share"),
        ({"epochs": 0.0}, "training.epochs is 0.0"),
      )
    ),
  ],
)
def test_a_name_that_does_not_exist_is_refused(tmp_path, changes, message):
  config = make_config(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    config_lib.parse(config)


def test_a_config_that_is_refused_leaves_no_workdir(data_dir, tmp_path):
  config = make_config(data_dir, distil_from=())
  with pytest.raises(config_lib.ConfigError, match="set distil_from"):
    run.run(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_config_of_another_version_is_refused_by_its_key(data_dir):
  for key in ("teacher_out_tta", "evaluation.teacher_tta"):
    config = make_config(data_dir)
    outer, _, inner = key.rpartition(".")
    del (config[outer] if outer else config)[inner]
    with pytest.raises(config_lib.ConfigError) as error:
      config_lib.parse(config)
    assert str(error.value) == (
      f"the config has no {key}: it may be for another version; compare it "
      "with those in configs/"
    )
  config = make_config(data_dir, distill_from=())
  with pytest.raises(
    ValueError, match='key of a config "distill_from"; did you mean "dis'
  ):
    config_lib.parse(config)
  config = make_config(data_dir, training={"epochs": 1.0})
  with pytest.raises(ValueError, match=r"no training\.learning_rate"):
    config_lib.parse(config)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("size", 40, "divisible by 32, not 40"),
    ("name", "isic", 'data set "isic".*isic2016'),
    ("tests", ("synthetic", "ph"), 'data set "ph"'),
    ("tests", (), "data.tests names nothing"),
  ],
)
def test_data_that_do_not_exist_are_refused(tmp_path, key, value, message):
  config = make_config(tmp_path)
  config.data[key] = value
  with pytest.raises(ValueError, match=message):
    config_lib.parse(config)


# ml_collections loads a config file by a way that Python gives up.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shipped", ["quickstart", "isic2016"])
def test_a_name_whose_own_test_pictures_are_not_scored_is_refused_with_the_flag(
  shipped,
):
  def parse(*changes):
    line = ["kdseg", f"--config=configs/{shipped}.py", *changes]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=line, lock_config=True
    )
    values(line)
    return config_lib.parse(values.config)

  with pytest.raises(ValueError, match=r'data\.name is "folder", but') as error:
    parse("--config.data.name=folder")
  flag = re.search(r"--config.data.tests=\"[^\"]*\"", str(error.value))[0]
  assert parse("--config.data.name=folder", *shlex.split(flag)).data.tests == (
    "folder",
  )


def test_a_tap_that_a_network_lacks_is_named_before_anything_is_trained(
  data_dir,
):
  config = make_config(data_dir)
  config.methods.mbf.taps = ("lwo",)
  with pytest.raises(
    config_lib.ConfigError,
    match=r"method \"mbf\" of arms\.patch_unet: the student has no tap 'lwo'",
  ):
    config_lib.check_taps(config_lib.parse(config))


def test_a_method_by_the_name_of_a_term_needs_no_definition(data_dir):
  config = make_config(data_dir)
  config.methods = {"cwd": {"terms": {"cwd": 0.5}}}
  config.arms = {
    "patch_unet": {"methods": ("none", "kd", "cwd"), "seeds": (0,)}
  }
  parsed = config_lib.parse(config)
  assert {name: dict(m.terms) for name, m in parsed.methods.items()} == {
    "cwd": {"cwd": 0.5},
    "none": {},
    "kd": {"kd": 1.0},
  }
  kd = next(arm_id for arm_id in parsed.arms if arm_id.method == "kd")
  assert parsed.switches(kd) == {"terms": {"kd": 1.0}}


def test_a_misspelt_term_is_answered_with_the_nearest(data_dir):
  config = make_config(data_dir)
  config.arms = {"patch_unet": {"methods": ("ultralbn",), "seeds": (0,)}}
  with pytest.raises(ValueError, match='did you mean "ultralbm"'):
    config_lib.parse(config)
