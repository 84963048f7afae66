"""Data sets as tfds builders, and what turns them into batches.

`sets.BUILDERS` are the data sets by name; importing this package makes them
known to `tfds.builder(name)`, too. They are written as array_record and read
by `builder.as_data_source(split)`; TensorFlow is needed for neither.

`loading.load` reads one split, resized, as uint8 arrays in memory; `pipeline`
makes batches of it.
"""

from kdseg.data import sets as sets
from kdseg.data.archives import DataError as DataError
