"""Fine-tuning data: pictures with captions from the layouts that public data sets come in, and the order of samples.

    python -m spqr_jax.data check PATH        # what is there, what is wrong, whether anything looks harmful

`KINDS` (spqr_jax.data.opening) lists the layouts; `load` draws a data set, `from_arrays` makes one of arrays.
"""

from spqr_jax.data.dataset import Dataset, from_arrays
from spqr_jax.data.opening import KINDS, load, open_source
from spqr_jax.data.order import curriculum_stages, sample_order

__all__ = ["KINDS", "Dataset", "curriculum_stages", "from_arrays", "load", "open_source", "sample_order"]
