"""Lets `python -m kdseg.deploy.page` run the command."""

import sys

from kdseg.deploy import page

if __name__ == "__main__":
  sys.exit(page.main())
