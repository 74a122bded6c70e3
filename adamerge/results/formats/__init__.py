"""Merged models in the formats of other libraries: written into a folder, loaded back there, and compared.

One module per format with ``write(merged, folder)``, which returns what the model card says of it, and
``prove(merged, folder)``, which loads the folder with the foreign library.
"""

from adamerge.results.formats.export import FORMATS as FORMATS
from adamerge.results.formats.export import export_as as export_as
from adamerge.results.formats.merged import MergedFolder as MergedFolder
from adamerge.results.formats.merged import open_merged as open_merged
