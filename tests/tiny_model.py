"""A network of a few hundred weights that calls dark pixels lesion."""

import functools

import jax
import numpy as np

from kdseg import networks
from kdseg.deploy import weights

SIZE = 32
OPTIONS = {"widths": [4, 4, 4], "depths": [1, 1, 1]}
ABOUT = {
  "network": "patch_unet",
  "options": OPTIONS,
  "size": SIZE,
  "threshold": 0.5,
}


@functools.cache
def variables():
  network = networks.make_network("patch_unet", **OPTIONS)
  drawn = networks.make_variables(
    network, jax.random.key(0), size=SIZE, weights=False
  )
  return jax.tree.map(np.asarray, drawn)


def write(path, **about):
  weights.save(path, variables(), ABOUT | about)
  return path
