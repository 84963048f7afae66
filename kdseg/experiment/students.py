"""Stage 2: trains all students together, in groups."""

import collections
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kdseg.data import loading
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import method as method_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import splits
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import cached_outputs as cached_outputs_lib
from kdseg.training import prepare as prepare_lib
from kdseg.training import stage

Tree = Any


def check_trained(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  arm_ids: list[config_lib.ArmId],
) -> None:
  """Refuses methods that are not what arms of that name were trained with.

  A method that was taken out of a config and put back is not compared by
  `workdir.check_config`.

  Raises:
    WorkdirError: that names the switch.
  """
  trained: dict[str, Any] = {}
  for path in list_groups(workdir):
    begun = json.loads(path.read_text(encoding="utf-8"))
    # Earlier versions wrote the names of the arms alone.
    trained |= begun if isinstance(begun, dict) else {}
  for arm_id in arm_ids:
    for name in ("about.json", "failed.json"):
      path = workdir / "arms" / arm_id.key / name
      if path.exists():
        about = json.loads(path.read_text(encoding="utf-8"))
        trained[arm_id.key] = about.get("switches", {})
  for arm_id in arm_ids:
    if arm_id.key not in trained:
      continue
    now = json.loads(json.dumps(config.methods[arm_id.method].to_dict()))
    for key, before, after in workdir_lib.differences(trained[arm_id.key], now):
      what, way_out = workdir_lib.say_change(
        f"methods.{arm_id.method}.{key}", before, after
      )
      raise workdir_lib.WorkdirError(
        f"{workdir} holds {arm_id.key} of another method of that name: {what}; "
        f"choose another name for it, another --workdir, or {way_out}"
      )


def train_students(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  log: workdir_lib.Log,
  arm_ids: list[config_lib.ArmId],
  methods: Mapping[str, method_lib.Method],
  teachers: Mapping[str, teachers_lib.Teacher],
  extensions: extensions_lib.Extensions,
  stop: preemption.Stop,
) -> None:
  """Trains every arm that has no result yet, all of them together.

  Arms that were stopped half-way are finished first, by themselves: arms that
  came later have seen nothing yet, and the batches are counted from 0.
  """
  run_config = config_lib.make_run_config(config)
  training = config_lib.make_train_config(dict(config.training))
  teacher = teachers_lib.join_teachers(config, teachers)
  while True:
    by_key = {arm_id.key: arm_id for arm_id in arm_ids}
    keys, number = hosts.on_first(lambda: _next_group(config, arm_ids, workdir))
    if not keys:
      return
    group = [by_key[key] for key in keys]
    folder = workdir / "checkpoints" / "arms" / number / "steps"
    teaching = _make_teaching(
      config, workdir, data, teacher, [methods[p.method] for p in group], stop
    )
    specs = {
      arm_id.key: make_spec(
        arm_id, config, workdir, methods, teaching.shapes, extensions
      )
      for arm_id in group
    }
    alike = max(collections.Counter(arm_id.arm for arm_id in group).values())
    at_once = min(run_config.seeds_at_once, alike)
    with teachers_lib.enough_to_train("students", len(group), config, at_once):
      stage.train_together(
        stage.Stage("students", folder, all_may_diverge=True),
        specs,
        run_config=run_config,
        training=training,
        inputs=stage.Inputs(
          data.train,
          data.validation,
          teach=teaching.teach,
          teacher_variables=teaching.variables,
          cached_outputs=teaching.cached_outputs,
        ),
        log=log,
        stop=stop,
      )


def list_untrained(
  workdir: pathlib.Path, arm_ids: list[config_lib.ArmId]
) -> list[config_lib.ArmId]:
  """Returns the arms that have neither weights nor a reason for having none."""
  return [
    arm_id
    for arm_id in arm_ids
    if not checkpoint.is_finished(workdir / "arms" / arm_id.key)
    and not (workdir / "arms" / arm_id.key / "failed.json").exists()
  ]


def make_spec(
  arm_id: config_lib.ArmId,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  methods: Mapping[str, method_lib.Method],
  teacher_out: Mapping[str, jax.ShapeDtypeStruct],
  extensions: extensions_lib.Extensions,
) -> arms_lib.ArmSpec:
  """Returns the student of a plan, ready to be trained.

  Args:
    arm_id: which one.
    config: of the experiment.
    workdir: where its weights will go.
    methods: by name.
    teacher_out: shapes of the teacher's outputs for one image.
    extensions: students that a user adds.

  Raises:
    ValueError: if the student or the teacher lacks a tap of the method.
  """
  method = methods[arm_id.method]
  student = config_lib.make_student(arm_id.student, config, extensions)
  distiller, inputs = arms_lib.make_distiller(
    student, teacher_out, method, size=config.data.size
  )
  return arms_lib.ArmSpec(
    kind=arm_id.arm,
    network=student,
    seed=arm_id.seed,
    destination=workdir / "arms" / arm_id.key,
    about={
      "arm": arm_id.arm,
      "network": arm_id.student,
      "method": arm_id.method,
      "switches": config.methods[arm_id.method].to_dict(),
    },
    method=method,
    distiller=distiller,
    distiller_inputs=inputs,
  )


def _next_group(
  config: ml_collections.ConfigDict,
  arm_ids: list[config_lib.ArmId],
  workdir: pathlib.Path,
) -> tuple[list[str], str]:
  """Returns the arms to train together next, and their number; or none.

  Raises:
    WorkdirError: if a training was begun with arms that are not in the plan.
  """
  open_keys = [arm_id.key for arm_id in list_untrained(workdir, arm_ids)]
  if not open_keys:
    return [], ""
  folder = workdir / "checkpoints" / "arms"
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  switches = {p.key: config.methods[p.method].to_dict() for p in arm_ids}
  groups = list_groups(workdir)
  for path in groups:
    keys = json.loads(path.read_text(encoding="utf-8"))
    if set(open_keys) & set(keys):
      missing = [key for key in keys if key not in switches]
      if missing:
        raise workdir_lib.WorkdirError(
          f"{path.parent} is a training of arms that the config has no more "
          f"({', '.join(missing)}); put them back, or delete that folder to "
          "start its other arms again"
        )
      return list(keys), path.parent.name
  # One may have been deleted: not by their count.
  number = max((int(path.parent.name) for path in groups), default=-1) + 1
  path = folder / f"{number:03d}" / "group.json"
  with files.writing(path):
    path.parent.mkdir(exist_ok=True)
  checkpoint.write_json(path, {key: switches[key] for key in open_keys})
  return open_keys, path.parent.name


def list_groups(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the group.json of every group of arms that was begun."""
  found = (workdir / "checkpoints" / "arms").glob("*/group.json")
  return sorted(path for path in found if path.parent.name.isdigit())


@dataclasses.dataclass(frozen=True)
class Teaching:
  """What the students of a group are given; all None without a teacher.

  Attributes:
    teach: asks the teacher for every batch; see `step.make_prepare`.
    variables: of the teacher, for `teach`.
    cached_outputs: the teacher's answers, computed before, in place of `teach`.
    shapes: of the teacher's outputs for one image.
  """

  teach: Callable[..., Mapping[str, jax.Array]] | None = None
  variables: Tree = None
  cached_outputs: Mapping[str, Mapping[str, np.ndarray]] | None = None
  shapes: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(
    default_factory=dict
  )


def _make_teaching(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  teacher: teachers_lib.Teacher | None,
  methods: list[method_lib.Method],
  stop: preemption.Stop = preemption.never,
) -> Teaching:
  """Prepares what a group's methods need of the teacher, and no more.

  Raises:
    ValueError: if a method needs a teacher and there is none.
  """
  needing = [method for method in methods if method.terms]
  if teacher is None:
    if needing:
      raise ValueError("methods with terms need a teacher: set distil_from")
    return Teaching()
  taps = config_lib.list_taps(methods)
  teach = prepare_lib.make_teach(
    teacher.network, taps, channels=config.teacher_channels
  )
  image = jax.ShapeDtypeStruct(
    (1, config.data.size, config.data.size, 3), jnp.float32
  )
  shapes = jax.eval_shape(teach, teacher.variables, image)
  if not config.precompute_teacher:
    if not needing:
      return Teaching()
    return Teaching(teach, teacher.variables, None, shapes)

  def answer(
    variables: Tree, image: jax.Array, encoder_features: Tree = None
  ) -> dict[str, jax.Array]:
    encoder_features = _nested(encoder_features) if encoder_features else None
    return teach(variables, image.astype(jnp.float32) / 255.0, encoder_features)

  name = "+".join(config.distil_from)
  key = teachers_lib.content_key(
    loading.fingerprint(data.train),
    teacher.variables,
    repr(teacher.network),
    str(config.teacher_channels),
    *taps,
  )
  cached_outputs = cached_outputs_lib.compute(
    teachers_lib.within_memory(
      teachers_lib.map_over_devices(answer, teacher.variables),
      f"{name}: answers",
      config,
    ),
    data.train.image,
    teachers_lib.cache_folder(workdir) / f"taught-{key[:12]}",
    batch_size=config.evaluation.batch_size,
    key=key,
    extra=teacher.encoder_features,
    progress=teachers_lib.log_progress(
      f"{name}: answers for the training images", stop
    ),
  )
  if config.teacher_out_tta == "dihedral":
    cached_outputs = cached_outputs_lib.average(cached_outputs)
  return Teaching(None, None, {"teacher_out": cached_outputs}, shapes)


def _nested(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Turns {"members_0/grids": x} into {"members_0": {"grids": x}}."""
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *outer, last = name.split("/")
    inner = nested
    for part in outer:
      inner = inner.setdefault(part, {})
    inner[last] = value
  return nested
