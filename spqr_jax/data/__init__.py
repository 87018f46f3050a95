"""Fine-tuning data: captioned images from the layouts of public data sets, and the order in which training sees them.

    python -m spqr_jax.data check PATH        # lists sizes, faults, and anything that looks harmful

`load` draws a data set from files, `from_arrays` makes one of arrays, and `KINDS` lists the layouts. This room knows
files and pixels. It may know no model and no other room; only its command line opens judges.
"""

from spqr_jax.data.dataset import Dataset, from_arrays
from spqr_jax.data.opening import KINDS, load, open_source, parts, places
from spqr_jax.data.order import Batch, curriculum_batches, curriculum_stages, sample_order, stage_rows

__all__ = [
    "KINDS",
    "Batch",
    "Dataset",
    "curriculum_batches",
    "curriculum_stages",
    "from_arrays",
    "load",
    "open_source",
    "parts",
    "places",
    "sample_order",
    "stage_rows",
]
