"""An experiment as typed records; `config.parse` makes them."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn

from kdseg import networks
from kdseg.data import sets
from kdseg.data.builder import PairBuilder
from kdseg.distill import method as method_lib
from kdseg.runtime import devices
from kdseg.runtime import preemption
from kdseg.training import settings

Tree = Any
Log = Callable[[Mapping[str, Any]], None]

# In `data.tests`: the validation images, for a search of settings that must
# not see a test set.
VALIDATION = "validation"
# The arm in scores.csv that is the mean of several teachers.
JOINT = "teacher"


@dataclasses.dataclass(frozen=True)
class ArmId:
  """A student to train: its arm in the tables, its method and its seed."""

  arm: str
  student: str
  method: str
  seed: int

  @property
  def key(self) -> str:
    """Names the arm and the seed in logs and folders."""
    return f"{self.arm}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images, and how large.

  Attributes:
    name: of the data set to train on.
    tests: data sets to score on; "validation" for the validation images.
    size: side of the images in pixels, a multiple of 32.
    batch_size: over all devices and hosts.
    manual_dir: folder of archives that have to be downloaded by hand.
    data_dir: where prepared data sets lie; "" for the default of tfds.
    options: of the builders, by data set.
    builders: of the package and of the user, by data set.
    allow_alike: ids, joined by commas, of images that may look like one of
      another split.
  """

  name: str
  tests: tuple[str, ...]
  size: int
  batch_size: int
  manual_dir: str
  data_dir: str
  options: Mapping[str, Mapping[str, Any]]
  builders: Mapping[str, type[PairBuilder]] = dataclasses.field(
    default_factory=lambda: sets.BUILDERS
  )
  allow_alike: str = ""

  def test_name(self, test: str) -> str:
    """Returns what an entry of `tests` is called in scores.csv."""
    if test == VALIDATION:
      return f"{self.name}_{VALIDATION}"
    return self.builders[test].test_name


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How networks are scored.

  Attributes:
    batch_size: over all devices and hosts.
    tta: test-time augmentation of the students, "none" or "dihedral".
    teacher_tta: of the teachers.
    groups: image ids by the name of a subgroup that the report lists.
  """

  batch_size: int
  tta: str
  teacher_tta: str
  groups: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """One teacher.

  Attributes:
    network: its name in `networks.NETWORKS`.
    options: of the network.
    seed: of its initial weights, and of its dropout.
    checkpoint: folder of a finished teacher to take; "" to train one.
    precompute: whether the outputs of its frozen blocks are computed once.
    training: how it is trained.
  """

  network: str
  options: Mapping[str, Any]
  seed: int
  checkpoint: str
  precompute: bool
  training: settings.TrainConfig

  def make(self) -> nn.Module:
    """Returns the module."""
    return networks.make_network(
      self.network, axis_name=devices.AXIS, **self.options
    )

  @property
  def is_random(self) -> bool:
    """Whether it stays randomly initialised: a control that knows nothing."""
    return not self.checkpoint and not self.training.steps(1, 1)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """A whole experiment; its fields are the keys of a config file.

  Attributes:
    seed: of the order of the data and of the augmentation.
    log_every: steps between log lines.
    data: which images.
    augment: fields of `data.augment.Strengths`.
    segmentation: weights of the segmentation terms.
    encoder_weights: whether encoders start from published weights.
    teachers: by name.
    distil_from: the teachers that the students learn from, as one.
    precompute_teacher: whether their outputs are computed once, for eight
      orientations of every training image.
    teacher_channels: of the teachers' features after their projection; 0 for
      what `distill.layers` finds fitting.
    teacher_out_tta: "dihedral" if the students learn from the teachers' mean
      over eight orientations, or "none".
    methods: by name.
    students: networks of the arms by name; in a file their options.
    arms: every student to train, the first seeds first; in a file methods and
      seeds by student.
    training: how the students are trained.
    evaluation: how networks are scored.
    primary: pairs (method, other) of the primary family of comparisons; of
      several others, the best on validation.
    seeds_at_once: seeds of an arm that one program updates; 0 for what suits
      the backend.
    mapping: how steps are mapped over devices, see `runtime.devices`.
    tree: what the file says, as JSON.
  """

  seed: int
  log_every: int
  data: DataConfig
  augment: Mapping[str, Any]
  segmentation: Mapping[str, float]
  encoder_weights: bool
  teachers: Mapping[str, TeacherConfig]
  distil_from: tuple[str, ...]
  precompute_teacher: bool
  teacher_channels: int
  teacher_out_tta: str
  methods: Mapping[str, method_lib.Method]
  students: Mapping[str, nn.Module]
  arms: tuple[ArmId, ...]
  training: settings.TrainConfig
  evaluation: EvaluationConfig
  primary: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
  seeds_at_once: int = 0
  mapping: str = "pmap"
  tree: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def run_config(self) -> settings.RunConfig:
    """What all trainings of the experiment have in common."""
    return settings.RunConfig(
      seed=self.seed,
      batch_size=self.data.batch_size,
      evaluation_batch_size=self.evaluation.batch_size,
      size=self.data.size,
      segmentation=self.segmentation,
      augment=self.augment,
      encoder_weights=self.encoder_weights,
      log_every=self.log_every,
      seeds_at_once=settings.seeds_at_once(self.seeds_at_once),
      mapping=self.mapping,
    )

  def switches(self, arm_id: ArmId) -> dict[str, Any]:
    """Returns the switches of an arm's method, as JSON."""
    return dict(self.tree["methods"][arm_id.method])


@dataclasses.dataclass(frozen=True)
class Run:
  """What every stage is given: the experiment and where it runs.

  Attributes:
    config: the experiment.
    workdir: where everything goes.
    log: writes one record to log.jsonl.
    stop: polled between pieces of work; if true, the run saves and raises
      StoppedError.
  """

  config: ExperimentConfig
  workdir: pathlib.Path
  log: Log = lambda record: None
  stop: preemption.Stop = preemption.never

  def arm_folder(self, arm_id: ArmId) -> pathlib.Path:
    """Returns where an arm's best weights go, or why it has none."""
    return self.workdir / "arms" / arm_id.key

  def teacher_folder(self, name: str) -> pathlib.Path:
    """Returns where a teacher's weights go."""
    return self.workdir / "teachers" / name


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
  """A finished network: its module and its weights, host arrays."""

  network: nn.Module
  variables: Tree
