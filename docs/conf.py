"""How Sphinx builds the site: `sphinx-build -W docs build/docs`."""

import configparser
import pathlib

_SETUP = configparser.ConfigParser()
_SETUP.read(pathlib.Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")

project = "kdseg"
author = _SETUP["metadata"]["author"]
copyright = f"2026, {author}"
version = release = _SETUP["metadata"]["version"]

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

autosummary_generate = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True  # A field of a module is documented once.
# Docstrings are prose: `name` in backticks is code, no cross-reference.
default_role = "code"

# Several records have a field `step`; no page links to either.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# The notebook trains a tiny student: run it anew at every build.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_raise_on_error = True

html_theme = "sphinx_book_theme"
html_title = "kdseg"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}


def _show_blocks_as_they_are(app, what, name, obj, options, lines):
  """Makes the indented blocks of a module's docstring literal ones."""
  if what != "module":
    return
  for i in range(len(lines) - 1, 1, -1):
    begins = lines[i].startswith("  ") and not lines[i - 1].strip()
    before = next((line for line in reversed(lines[:i]) if line.strip()), "")
    if begins and not before.startswith("  "):
      lines[i:i] = ["::", ""]


def setup(app):
  """Connects what this file adds to Sphinx."""
  app.connect("autodoc-process-docstring", _show_blocks_as_they_are)
