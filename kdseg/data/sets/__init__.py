"""The data sets: one module and one row of `BUILDERS` each."""

import types

from kdseg.data.builder import PairBuilder
from kdseg.data.sets.folder import Folder
from kdseg.data.sets.isic2016 import Isic2016
from kdseg.data.sets.ph2 import Ph2
from kdseg.data.sets.synthetic import Synthetic

BUILDERS: types.MappingProxyType[str, type[PairBuilder]] = (
  types.MappingProxyType(
    {builder.name: builder for builder in (Isic2016, Ph2, Synthetic, Folder)}
  )
)
