"""Checks a machine and an installation, and says what to do: `kdseg doctor`."""
