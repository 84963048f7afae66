"""Trained networks without training: weights, export formats, a web page.

`weights` is the file format, `models` finds and runs a network, `export` writes
it in the `formats` of other runtimes, and `pictures` reads images.
"""
