"""Data sets as tfds builders, and what turns them into batches.

Importing this package makes `isic2016`, `ph2`, `synthetic` and `folder` known
to `tfds.builder(name)`. They are written as array_record and read by
`builder.as_data_source(split)`; TensorFlow is needed for neither.

`pipeline.load` is what the rest of kdseg uses: one split, resized, as uint8
arrays in memory.
"""

from kdseg.data.archives import DataError as DataError
from kdseg.data.sets import folder as folder
from kdseg.data.sets import isic2016 as isic2016
from kdseg.data.sets import ph2 as ph2
from kdseg.data.sets import synthetic as synthetic
