"""The board: many submissions as a static site, which is opened as a file or hosted as a folder.

`python -m spqr_jax.report board DIR... --out SITE` verifies every bundle, ranks the rows of those that pass, and lists
the others apart. This room may know everything below it, and nothing of `fit`. It needs no accelerator.

Bundles are not trusted. Their texts are escaped, control characters are replaced, and the content-security policy of a
page allows its own style and script alone. A name that a bundle chose is in no path: those are made of its id.
"""

from spqr_jax.board.site import write

__all__ = ["write"]
