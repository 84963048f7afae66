"""Stage 2: trains the students of all arms, those of a group together."""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from kdseg.data import loading
from kdseg.distill import method as method_lib
from kdseg.experiment import frozen
from kdseg.experiment import jobs
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.experiment.records import ArmId
from kdseg.experiment.records import Run
from kdseg.experiment.splits import Data
from kdseg.experiment.teachers import Teacher
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.training import arms as arms_lib
from kdseg.training import cached_outputs
from kdseg.training import prepare as prepare_lib
from kdseg.training import stage

Tree = Any


def train_students(
  run: Run, data: Data, teachers: Mapping[str, Teacher]
) -> None:
  """Trains every arm that has no result yet, group by group.

  Raises:
    StoppedError: if `run.stop` says so.
    WorkdirError: see `jobs.list_jobs`.
  """
  config = run.config
  teacher = teachers_lib.join_teachers(
    teachers[name] for name in config.distil_from
  )
  for job in jobs.list_jobs(run):
    if job.kind != jobs.STUDENTS:
      continue
    group = [arm_id for arm_id in config.arms if arm_id.key in job.arms]
    folder = jobs.group_folder(run) / job.name
    if hosts.is_first():
      _begin(run, folder, group)
    inputs, teacher_out = make_inputs(
      run, data, teacher, [config.methods[arm_id.method] for arm_id in group]
    )
    alike = max(collections.Counter(arm_id.arm for arm_id in group).values())
    at_once = min(config.run_config.seeds_at_once, alike)
    with teachers_lib.enough_to_train(run, "students", len(group), at_once):
      stage.train_together(
        stage.Stage("students", folder / "steps", all_may_diverge=True),
        {arm_id.key: make_spec(run, arm_id, teacher_out) for arm_id in group},
        run_config=config.run_config,
        training=config.training,
        inputs=inputs,
        log=run.log,
        stop=run.stop,
      )


def _begin(run: Run, folder: pathlib.Path, group: list[ArmId]) -> None:
  """Notes which arms a group has, and the switches of their methods."""
  path = folder / "group.json"
  if not path.exists():
    with files.writing(path):
      folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(
      path, {arm_id.key: run.config.switches(arm_id) for arm_id in group}
    )


def check_trained(run: Run) -> None:
  """Refuses methods that are not what arms of that name were trained with.

  `workdir.check_config` does not know a method that was taken out of a config
  and put back.

  Raises:
    WorkdirError: that names the switch.
  """
  trained: dict[str, Any] = {}
  for switches in jobs.read_groups(run).values():
    trained |= switches
  for arm_id in run.config.arms:
    about = read_about(run, arm_id)
    before = about["switches"] if about else trained.get(arm_id.key)
    if before is None:
      continue
    for key, old, new in workdir_lib.differences(
      before, run.config.switches(arm_id)
    ):
      what, way_out = workdir_lib.say_change(
        f"methods.{arm_id.method}.{key}", old, new
      )
      raise workdir_lib.WorkdirError(
        f"{run.workdir} holds {arm_id.key} of another method of that name: "
        f"{what}; choose another name for it, another --workdir, or {way_out}"
      )


def read_about(run: Run, arm_id: ArmId) -> dict[str, Any]:
  """Returns what lies beside an arm's weights, or in their place; or {}."""
  for name in ("about.json", "failed.json"):
    path = run.arm_folder(arm_id) / name
    if path.exists():
      return json.loads(path.read_text(encoding="utf-8"))
  return {}


def make_spec(
  run: Run, arm_id: ArmId, teacher_out: Mapping[str, jax.ShapeDtypeStruct]
) -> arms_lib.ArmSpec:
  """Returns what trains an arm.

  Args:
    run: the experiment.
    arm_id: which arm.
    teacher_out: shapes of the teacher's outputs for one image.

  Raises:
    ValueError: if the student or the teacher lacks a tap of the method.
  """
  method = run.config.methods[arm_id.method]
  student = run.config.students[arm_id.student]
  distiller, inputs = arms_lib.make_distiller(
    student, teacher_out, method, size=run.config.data.size
  )
  return arms_lib.ArmSpec(
    kind=arm_id.arm,
    network=student,
    seed=arm_id.seed,
    destination=run.arm_folder(arm_id),
    about={
      "arm": arm_id.arm,
      "network": arm_id.student,
      "method": arm_id.method,
      "switches": run.config.switches(arm_id),
    },
    method=method,
    distiller=distiller,
    distiller_inputs=inputs,
  )


def list_taps(methods: Iterable[method_lib.Method]) -> tuple[str, ...]:
  """Returns the names of all features that the methods compare."""
  return tuple(sorted({tap for m in methods if m.needs_taps for tap in m.taps}))


def make_inputs(
  run: Run,
  data: Data,
  teacher: Teacher | None,
  methods: Iterable[method_lib.Method],
) -> tuple[stage.Inputs, Mapping[str, jax.ShapeDtypeStruct]]:
  """Returns what a group is trained on, and shapes of the teacher's outputs.

  The teacher's outputs are prepared as far as the methods need them. Cached
  outputs are those of eight orientations, so that all batches come in one of
  them, whether a method reads the outputs or not.
  """
  config, methods = run.config, list(methods)
  inputs = stage.Inputs(data.train, data.validation)
  is_needed = any(method.terms for method in methods)
  if teacher is None or not (is_needed or config.precompute_teacher):
    return inputs, {}
  taps = list_taps(methods)
  teach = prepare_lib.make_teach(
    teacher.network, taps, channels=config.teacher_channels
  )
  size = config.data.size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(teach, teacher.variables, image)
  if not config.precompute_teacher:
    return dataclasses.replace(
      inputs, teach=teach, teacher_variables=teacher.variables
    ), shapes

  def compute(
    variables: Tree, image: jax.Array, encoder_features: Tree = None
  ) -> Mapping[str, jax.Array]:
    encoder_features = _nested(encoder_features) if encoder_features else None
    return teach(variables, image.astype(jnp.float32) / 255.0, encoder_features)

  key = frozen.content_key(
    loading.fingerprint(data.train),
    teacher.variables,
    repr(teacher.network),
    str(config.teacher_channels),
    *taps,
  )
  cached = frozen.compute_outputs(
    run,
    compute,
    teacher.variables,
    data.train,
    what=f"{'+'.join(config.distil_from)}: outputs for the training images",
    folder=f"teacher_out-{key[:12]}",
    key=key,
    extra=teacher.encoder_features,
  )
  if config.teacher_out_tta == "dihedral":
    cached = cached_outputs.average(cached)
  cached_by_use = {"teacher_out": cached}
  return dataclasses.replace(inputs, cached_outputs=cached_by_use), shapes


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
