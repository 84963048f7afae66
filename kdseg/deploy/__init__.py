"""A trained network where there is no training: files, models, pictures.

`weights` is the file format, `models` finds and runs a network, `pictures`
reads whatever people call an image. `python -m kdseg.predict` is made of them.
"""
