"""README, the pages of docs/ and results/ say what is true of the code."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import jax.numpy as jnp
from PIL import Image
import pytest
import tiny
from tiny_run import make_config

from kdseg import cli
from kdseg.data import loading
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


def read(name: str = "README.md") -> str:
  return (ROOT / name).read_text(encoding="utf-8")


PAGES = {
  name: read(name)
  for name in (
    "README.md",
    "results/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
  )
}
SCRIPT = f"```sh\n{read('results/commands.sh')}```\n"


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


def missing_paths(text: str, folder: pathlib.Path = ROOT) -> list[str]:
  """Returns the paths that a page names and the repository lacks.

  Args:
    text: of the page.
    folder: where the page lies; its links are relative to that.
  """
  words = re.findall(r"`([^`\n]+)`", prose(text))
  words = [word for span in words for word in span.split()]
  for command in commands(text):
    words += [word.split("=")[-1].split(":")[0] for word in command]
  named = {word: ROOT / word for word in words if is_path(word)}
  for target in re.findall(r"\]\(([^)\s]+)", prose(text)):
    if not re.match(r"[a-z]+:|#", target):
      named[target] = folder / target.partition("#")[0]
  return sorted(
    name
    for name, path in named.items()
    if not path.exists() and not (folder / name).exists()
  )


def missing_names(text: str) -> list[str]:
  """Returns what is called `room.module.name` and is not defined there.

  `data.size` and the like are keys of a config: `data` has no module `size`.
  """
  missing = []
  for name in re.findall(
    r"`((?:kdseg\.)?\w+(?:\.\w+)+)(?:\(\))?`", prose(text)
  ):
    *rooms, last = name.removeprefix("kdseg.").split(".")
    path = ROOT.joinpath("kdseg", *rooms).with_suffix(".py")
    if path.exists() and last not in defined(path):
      missing.append(name)
  return missing


def defined(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.ImportFrom):
      names |= {alias.asname or alias.name for alias in node.names}
    elif isinstance(node, ast.Assign):
      names |= {ast.unparse(target) for target in node.targets}
    elif isinstance(node, ast.AnnAssign):
      names.add(ast.unparse(node.target))
  return names


def module_file(module: str) -> pathlib.Path:
  path = ROOT.joinpath(*module.split("."))
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def modules_run(text: str) -> list[tuple[str, list[str]]]:
  """Returns (module, arguments) of each `python -m kdseg...`, `kdseg ...`."""
  found = []
  for command in commands(text):
    if command[0] == "kdseg":
      found.append((cli.SUBCOMMANDS[command[1]][0], command[2:]))
    elif (
      re.match(r"python[\d.]*$", command[0])
      and command[1:2] == ["-m"]
      and command[2].split(".")[0] == "kdseg"
    ):
      found.append((command[2], command[3:]))
  return found


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
  lines = [line for block in blocks(read()) for line in block.text.split("\n")]
  for command in SETUP:
    assert lines.count(command) == 1, command


def test_the_readme_is_read_in_five_minutes():
  assert len(read().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
  assert missing_paths(PAGES[page], (ROOT / page).parent) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_a_module_is_defined_there(page):
  assert missing_names(PAGES[page]) == []


def test_every_command_exists_and_every_flag_of_a_run_parses():
  run_here = [
    command
    for text in (*PAGES.values(), SCRIPT)
    for command in modules_run(text)
  ]
  for module, _ in run_here:
    assert module_file(module).exists(), module
  of_main = [a for module, a in run_here if module == "kdseg.main"]
  assert len(of_main) > 25
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


def test_the_commands_of_the_results_are_a_script_of_a_shell():
  script = ROOT / "results" / "commands.sh"
  subprocess.run(["bash", "-n", str(script)], check=True)
  assert len(modules_run(SCRIPT)) == len(
    re.findall(r"^python -m", script.read_text(), re.MULTILINE)
  )


def test_every_python_block_compiles():
  for page, text in PAGES.items():
    for block in blocks(text):
      if block.language in ("python", "py"):
        compile(block.text, page, "exec")


def test_what_the_readme_loads_segments():
  [block] = [b for b in blocks(read()) if b.tested and "kdseg.load" in b.text]
  names = {}
  exec(compile(block.text, "README.md", "exec"), names)
  assert names["probability"].shape == (300, 400)


IMPORTS = """
from flax import linen as nn
import jax.numpy as jnp
from kdseg.data import archives, builder, pairs
"""


@pytest.fixture(scope="module")
def shown():
  """What the README shows how to add, by name."""
  [block] = [b for b in blocks(read()) if b.tested and "def " in b.text]
  names = {}
  exec(compile(IMPORTS + block.text, "README.md", "exec"), names)
  return names


def test_the_readmes_term_is_one_value_an_image(shown):
  edges = {"logits": jnp.array([[[0.0, 2.0], [1.0, -1.0]]] * 3)}
  flat = {"logits": jnp.zeros((3, 2, 2))}
  term = shown["soft_edges"]
  assert term(edges, edges, None, None).tolist() == [0.0] * 3
  assert (term(edges, flat, None, None) > 0).all()


def test_the_readmes_data_set_is_prepared_and_read(shown, tmp_path):
  images, masks = tiny.draw_lesions(40)
  folder = tmp_path / "pictures"
  folder.mkdir()
  for number, (image, mask) in enumerate(zip(images, masks)):
    Image.fromarray(image).save(folder / f"lesion_{number:02d}.jpg")
    Image.fromarray(255 * mask).save(folder / f"lesion_{number:02d}_mask.png")
  train, validation, test = (
    loading.load(
      "side_by_side",
      split,
      size=32,
      data_dir=tmp_path / "data",
      manual_dir=folder,
      builders={"side_by_side": shown["SideBySide"]},
    )
    for split in ("train", "validation", "test")
  )
  assert test.ids == tuple(f"lesion_{number:02d}" for number in range(20))
  assert len(train) + len(validation) == 20
  assert (test.mask == masks[:20]).all()


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
  """What docs/extend.md hands to `kdseg.run`, run in small: config, workdir."""
  page = PAGES["docs/extend.md"]
  [block] = [b for b in blocks(page) if "kdseg.run(" in b.text]
  folder = tmp_path_factory.mktemp("own")
  given = []
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT))
    patch.setattr(run_lib, "run", lambda *arguments: given.append(arguments))
    exec(compile(block.text, "extend.md", "exec"), {"__name__": "own"})
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


SAMPLE = """
See `kdseg/main.py`, `configs/none.py`, `LICENSE.cff`, `table.md`, `runs/x.py`
and [this](CHANGELOG.md), [that](gone.png), [them](https://example.org/a.py);
`main.main`, `main.gone`, `kdseg.training.loop.fit`, `losses.mbf.gone`,
`json.dumps`.

```sh
pip install -e . && python -m kdseg.main --config \\
  configs/gone.py:small --workdir 'a b' ; launch/gone.sh
kdseg report runs/a  # again
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
  assert missing_names(SAMPLE) == ["main.gone", "losses.mbf.gone"]


def test_commands_are_read_as_a_shell_reads_them():
  assert modules_run(SAMPLE) == [
    (
      "kdseg.main",
      ["--config", "configs/gone.py:small", "--workdir", "a b"],
    ),
    ("kdseg.report.__main__", ["runs/a"]),
  ]


def test_a_marked_block_is_told_from_others():
  assert [(block.language, block.tested) for block in blocks(SAMPLE)] == [
    ("sh", False),
    ("python", True),
  ]
