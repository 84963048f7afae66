"""What a check finds, and how it is printed."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import enum
from importlib import metadata
from typing import NamedTuple


class Level(enum.StrEnum):
  """How bad a finding is; only a problem changes the exit code."""

  OK = "ok"
  WARNING = "warning"
  PROBLEM = "problem"


class Finding(NamedTuple):
  """What a check found.

  Attributes:
    level: how bad it is.
    text: what was found.
    advice: what to do about it, or "".
  """

  level: Level
  text: str
  advice: str = ""


Check = Callable[[], Iterable[Finding]]


def ok(text: str, advice: str = "") -> Finding:
  """Returns a finding that nothing is wrong with."""
  return Finding(Level.OK, text, advice)


def warning(text: str, advice: str = "") -> Finding:
  """Returns a finding of something optional that is missing or slow."""
  return Finding(Level.WARNING, text, advice)


def problem(text: str, advice: str = "") -> Finding:
  """Returns a finding that a run would fail on."""
  return Finding(Level.PROBLEM, text, advice)


def installed(package: str) -> str:
  """Returns the version of a package, or "" if it is not installed."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def one_line(error: BaseException) -> str:
  """Returns an error's message without its line breaks."""
  return " ".join(str(error).split())


def run(checks: Mapping[str, Check]) -> Iterator[tuple[str, Finding]]:
  """Yields what each check finds, by its name, as it is found.

  Args:
    checks: by name; one that raises is a problem and stops no other.
  """
  for name, check in checks.items():
    try:
      for finding in check():
        yield name, finding
    except Exception as error:
      kind = type(error).__name__
      yield name, problem(f"this check failed: {kind}: {one_line(error)}")


def as_text(name: str, finding: Finding) -> str:
  """Returns a finding as a line, and one more for its advice."""
  text = f"{name:<13} {finding.level:<7}  {finding.text}"
  return f"{text}\n{'':<23}-> {finding.advice}" if finding.advice else text


def as_json(name: str, finding: Finding) -> dict[str, str]:
  """Returns a finding as an object of JSON."""
  return {"check": name, **finding._asdict()}
