"""One experiment, whole: data, teachers, students, scores, report.

Every stage leaves a finished artefact in the workdir and is passed over when
it is there; a training that was stopped goes on from its last checkpoint. So
a second start continues the first, and a third finds nothing to do.
"""

from collections.abc import Mapping
import contextlib
import logging
import pathlib
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from kdseg import networks
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import method as method_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import reporting
from kdseg.experiment import scoring
from kdseg.experiment import splits
from kdseg.experiment import students
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import loop

_LOG = logging.getLogger("kdseg")


def run(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  extensions: extensions_lib.Extensions | None = None,
  *,
  stop: preemption.Stop = preemption.never,
) -> bool:
  """Runs what is not finished of an experiment.

  Args:
    config: see `configs/`.
    workdir: made if it is missing.
    extensions: losses, regions and students that the config names and the
      package does not have. A workdir does not store them: pass them again.
    stop: asked now and then whether to save and stop; see `stopping`.

  Returns:
    Whether anything was left to do.

  Raises:
    StoppedError: if `stop` says so; the same call continues.
    WorkdirError: if another process uses the workdir, or it holds a run of
      another config.
    DataError: if the data are not as they should be.
    ConfigError: on a config that cannot be run.
    WriteError: if the disk is full or may not be written to; the same call
      continues.
    OutOfMemoryError: if there is not enough memory; the same call continues.
  """
  workdir = pathlib.Path(workdir)
  extensions = extensions or extensions_lib.Extensions()
  arm_ids, methods = config_lib.check(config, extensions)
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:

    def enter() -> bool:
      stack.enter_context(workdir_lib.locked(workdir))
      same = workdir_lib.check_config(config, workdir)
      students.check_trained(config, workdir, arm_ids)
      return same and reporting.is_finished(config, workdir, arm_ids)

    if hosts.on_first(enter):
      _LOG.info("%s is finished; nothing to do", workdir)
      return False
    _check_taps(config, arm_ids, methods, extensions)
    started = time.monotonic()
    log = workdir_lib.make_log(workdir)
    with memory.enough(
      f"data: images of {config.data.size} x {config.data.size}",
      "Free some, then the same command continues; or lower data.size, in "
      "another --workdir",
    ):
      data = splits.load(config)
    splits.check_agreement(data)

    def adopt() -> None:
      facts = splits.describe(data)
      workdir_lib.check_data(workdir, facts)
      # Not before the data are there: a slip in a first command costs nothing.
      workdir_lib.adopt_config(config, workdir)
      workdir_lib.write_environment(workdir, facts)

    hosts.on_first(adopt)
    teachers = {
      name: teachers_lib.make_teacher(name, config, workdir, data, log, stop)
      for name in config.teachers
    }
    students.train_students(
      config, workdir, data, log, arm_ids, methods, teachers, extensions, stop
    )
    scoring.score(config, workdir, data, arm_ids, teachers, extensions, stop)
    hosts.on_first(
      lambda: reporting.write_report(config, workdir, data, arm_ids, extensions)
    )
    seconds = time.monotonic() - started
    log({"stage": "run", "seconds": round(seconds, 1)})
    _LOG.info(
      "finished after %s; results in %s",
      loop.duration(seconds),
      workdir / "table.md",
    )
  return True


def _check_taps(
  config: ml_collections.ConfigDict,
  arm_ids: list[config_lib.ArmId],
  methods: Mapping[str, method_lib.Method],
  extensions: extensions_lib.Extensions,
) -> None:
  """Refuses methods that compare what a network does not have.

  Apart from `check`, as it traces the networks.

  Raises:
    ConfigError: that names the method and the tap.
  """
  image = jnp.zeros((1, config.data.size, config.data.size, 3))

  def outputs(network: nn.Module) -> list[str]:
    shapes = jax.eval_shape(
      lambda rng: network.init_with_output(rng, image)[0], jax.random.key(0)
    )
    return list(shapes)

  wanted: dict[str, list[str]] = {}
  for arm_id in arm_ids:
    if methods[arm_id.method].needs_taps:
      wanted.setdefault(arm_id.student, []).append(arm_id.method)
  if not wanted:
    return
  networks_ = [
    networks.make_network(c.network, **dict(c.options))
    for c in (config.teachers[name] for name in config.distil_from)
  ]
  of_teachers = [outputs(network) for network in networks_]
  for student, names in wanted.items():
    of_student = outputs(config_lib.make_student(student, config, extensions))
    for name in dict.fromkeys(names):
      for of_teacher in of_teachers:
        try:
          arms_lib.check_taps(methods[name].taps, of_student, of_teacher)
        except ValueError as error:
          raise config_lib.ConfigError(
            f'method "{name}" of arms.{student}: {error}'
          ) from error
