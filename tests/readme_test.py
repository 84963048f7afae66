"""The README says nothing that the repository does not hold."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
import tiny
from tiny_run import make_config

from kdseg.experiment import run as run_lib
from kdseg.runtime import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETUP = (
  "pip install -e . && python -m kdseg.main --config configs/quickstart.py"
  " --workdir runs/quickstart",
  "pip install -e '.[test]' && pytest",
)
FOLDERS = (
  ".ci",
  "benchmarks",
  "configs",
  "docs",
  "kdseg",
  "launch",
  "results",
  "tests",
)
SUFFIXES = (".py", ".sh", ".sbatch", ".cfg", ".toml", ".cff")
# Parses flags as the program does, a fresh process for each command because
# what a flag of a config overrides stays overridden.
PARSE = """
import json, os, sys
from absl import flags
from kdseg import main
for number, argv in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    sys.argv = argv
    try:
      rest = flags.FLAGS(argv)
      assert len(rest) == 1, f"no flags: {rest[1:]}"
      assert flags.FLAGS.config is not None and flags.FLAGS.workdir
    except BaseException as error:
      print(number, repr(error), flush=True)
      os._exit(1)
    os._exit(0)
  os.waitpid(child, 0)
"""


class Block(NamedTuple):
  """A fenced block: its language, its text, and whether it is to be run."""

  language: str
  text: str
  tested: bool


def readme(folder: str = "") -> str:
  path = ROOT / folder / "README.md"
  assert path.exists(), "there is no README.md: write it"
  return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
  pattern = re.compile(
    r"^(<!-- test -->\n+)?```(\w*)[^\n]*\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
  )
  return [
    Block(found[2], found[3], bool(found[1]))
    for found in pattern.finditer(text)
  ]


def prose(text: str) -> str:
  return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
  """Returns the words of each command of the shell blocks."""
  found = []
  for block in blocks(text):
    if block.language not in ("sh", "bash", "shell", "console"):
      continue
    for line in block.text.replace("\\\n", " ").splitlines():
      lexer = shlex.shlex(
        line.removeprefix("$ "), posix=True, punctuation_chars="&|;"
      )
      lexer.whitespace_split = True
      command: list[str] = []
      for word in lexer:
        if set(word) <= set("&|;"):
          found.append(command)
          command = []
        else:
          command.append(word)
      found.append(command)
  return [command for command in found if command]


def is_path(word: str) -> bool:
  """Whether a word means a file or folder of the repository."""
  if not re.fullmatch(r"[\w./-]+", word) or word.startswith(("/", "runs/")):
    return False
  first, slash, _ = word.partition("/")
  return (bool(slash) and first in FOLDERS) or word.endswith(SUFFIXES)


def missing_paths(text: str, root: pathlib.Path = ROOT) -> list[str]:
  """Returns the paths that a text names and the repository lacks."""
  words = re.findall(r"`([^`\n]+)`", prose(text))
  words = [word for span in words for word in span.split()]
  for command in commands(text):
    words += [word.split("=")[-1].split(":")[0] for word in command]
  named = [word for word in words if is_path(word)]
  for target in re.findall(r"\]\(([^)\s]+)", prose(text)):
    if not re.match(r"[a-z]+:|#", target):
      named.append(target.partition("#")[0])
  return sorted({name for name in named if not (root / name).exists()})


def missing_names(text: str) -> list[str]:
  """Returns what is called `module.Name` and not defined in that module."""
  missing = []
  for module, name in re.findall(r"`(?:kdseg\.)?(\w+)\.(\w+)`", prose(text)):
    path = ROOT / "kdseg" / f"{module}.py"
    if path.exists() and name not in defined(path):
      missing.append(f"{module}.{name}")
  return missing


def defined(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Assign):
      names |= {ast.unparse(target) for target in node.targets}
  return names


def module_file(module: str) -> pathlib.Path:
  path = ROOT.joinpath(*module.split("."))
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def modules_run(text: str) -> list[tuple[str, list[str]]]:
  """Returns (module, arguments) of each `python -m kdseg...`."""
  return [
    (command[2], command[3:])
    for command in commands(text)
    if re.match(r"python[\d.]*$", command[0])
    and command[1:2] == ["-m"]
    and command[2].split(".")[0] == "kdseg"
  ]


def config_of(arguments: list[str]) -> str:
  """Returns the file that `--config` names."""
  for index, word in enumerate(arguments):
    if word == "--config":
      return arguments[index + 1].partition(":")[0]
    if word.startswith("--config="):
      return word.removeprefix("--config=").partition(":")[0]
  raise ValueError(f"no --config in {arguments}")


def run(
  code: str, cwd: pathlib.Path = ROOT, given: str = ""
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    input=given,
    capture_output=True,
    text=True,
    check=False,
  )


def flag_errors(commands_of_main: list[list[str]]) -> str:
  argvs = [["main.py", *arguments] for arguments in commands_of_main]
  done = run(PARSE, given=json.dumps(argvs))
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_two_set_up_commands_stand_word_for_word():
  lines = [
    line for block in blocks(readme()) for line in block.text.split("\n")
  ]
  for command in SETUP:
    assert lines.count(command) == 1, command


def test_every_path_exists():
  assert missing_paths(readme()) == []
  of_results = missing_paths(readme("results"))
  assert [p for p in of_results if not (ROOT / "results" / p).exists()] == []


def test_every_name_of_a_module_is_defined_there():
  assert missing_names(readme()) == []


def test_every_module_that_is_run_exists():
  run_here = modules_run(readme())
  assert "kdseg.main" in [module for module, _ in run_here]
  for module, _ in run_here:
    assert module_file(module).exists(), module


def test_every_config_exists_and_every_flag_parses():
  run_here = modules_run(readme()) + modules_run(readme("results"))
  of_main = [a for module, a in run_here if module == "kdseg.main"]
  for arguments in of_main:
    assert (ROOT / config_of(arguments)).exists(), arguments
  wrong = [
    ["--config", "configs/quickstart.py", "--workdir", "w", "--wrong", "1"],
    ["--config=configs/quickstart.py", "--workdir=w", "--config.sead=1"],
    ["--config", "configs/quickstart.py"],
  ]
  errors = flag_errors([*of_main, *wrong]).splitlines()
  numbers = [int(line.split()[0]) for line in errors]
  assert numbers == [len(of_main) + n for n in range(len(wrong))], errors


def test_every_python_block_compiles():
  for block in blocks(readme()):
    if block.language in ("python", "py"):
      compile(block.text, "README.md", "exec")


def test_every_marked_block_runs(tmp_path):
  for block in blocks(readme()):
    if block.tested:
      assert block.language == "python", f"cannot run {block.language}"
      done = run(block.text, tmp_path)
      assert done.returncode == 0, f"{block.text}\n{done.stderr}"


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
  """What the block that adds its own hands to `kdseg.run`, and ran in
  small: (config, workdir)."""
  [block] = [b for b in blocks(readme()) if "kdseg.run(" in b.text]
  folder = tmp_path_factory.mktemp("own")
  given = []
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT))
    patch.setattr(run_lib, "run", lambda *arguments: given.append(arguments))
    exec(compile(block.text, "README.md", "exec"), {"__name__": "own"})
  [(config, _, extensions)] = given
  tiny_config = make_config(folder / "data")
  for key in ("data", "training"):
    config[key] = tiny_config[key]
  config.teachers.teacher_unet.options = {
    "widths": (4, 4, 4),
    "depths": (1, 1, 1),
  }
  config.teachers.teacher_unet.training = {"epochs": 1.0, "learning_rate": 1e-2}
  config.evaluation.batch_size = 8
  # The shipped arms have tests of their own.
  del config.arms.patch_unet_12k
  with tiny.compile_once(folder / "compiled"):
    assert run_lib.run(config, folder / "run", extensions)
  return config, folder / "run"


def test_what_a_user_adds_is_trained_and_scored(own_run):
  _, workdir = own_run
  rows = (workdir / "scores.csv").read_text().splitlines()[1:]
  arms = {row.split(",")[0] for row in rows}
  assert arms == {"teacher_unet", "thin-none", "thin-edges", "thin-left"}
  log = (workdir / "log.jsonl").read_text()
  assert '"soft_edges"' in log
  assert '"mbf_decoder_low"' in log


def test_what_a_user_adds_takes_part(own_run):
  _, workdir = own_run
  weights = [
    checkpoint.load_variables(workdir / "arms" / f"thin-{method}-seed0")[0]
    for method in ("none", "edges", "left")
  ]
  kernels = [w["params"]["Conv_0"]["kernel"] for w in weights]
  assert (kernels[0] != kernels[1]).any()
  assert (kernels[0] != kernels[2]).any()


def test_a_name_that_a_user_did_not_hand_over_is_refused(own_run):
  config, workdir = own_run
  with pytest.raises(ValueError, match="soft_edges"):
    run_lib.run(config, workdir)


def test_no_placeholder_is_left():
  assert re.findall(r"^[A-Z_]{5,}$", prose(readme()), re.MULTILINE) == []


SAMPLE = """
See `kdseg/main.py`, `configs/none.py`, `LICENSE.cff`, `table.md`, `runs/x.py`
and [this](CHANGELOG.md), [that](gone.png), [them](https://example.org/a.py);
`main.main`, `main.gone`, `kdseg.training.loop.fit`, `json.dumps`.

```sh
pip install -e . && python -m kdseg.main --config \\
  configs/gone.py:small --workdir 'a b' ; launch/gone.sh
python3.12 -m kdseg.report runs/a  # again
```

<!-- test -->
```python
import kdseg
```
"""


def test_a_path_that_is_not_there_is_found():
  assert missing_paths(SAMPLE) == [
    "LICENSE.cff",
    "configs/gone.py",
    "configs/none.py",
    "gone.png",
    "launch/gone.sh",
  ]


def test_a_name_that_is_not_there_is_found():
  assert missing_names(SAMPLE) == ["main.gone"]


def test_commands_are_read_as_a_shell_reads_them():
  assert modules_run(SAMPLE) == [
    (
      "kdseg.main",
      ["--config", "configs/gone.py:small", "--workdir", "a b"],
    ),
    ("kdseg.report", ["runs/a"]),
  ]


def test_a_marked_block_is_told_from_others():
  assert [(block.language, block.tested) for block in blocks(SAMPLE)] == [
    ("sh", False),
    ("python", True),
  ]


@pytest.mark.parametrize(
  ("module", "exists"),
  [
    ("kdseg.main", True),
    ("kdseg.report", True),
    ("kdseg.gone", False),
    ("kdseg.losses", False),
  ],
)
def test_a_module_exists_if_python_could_run_it(module, exists):
  assert module_file(module).exists() == exists
