"""Every kind of attachment, as files on disk name them."""

from spqr_jax.sampling.attached.delta import Delta
from spqr_jax.sampling.attached.membranes import Membranes
from spqr_jax.sampling.attached.safe_guidance import SLD

KINDS = (SLD, Delta, Membranes)
