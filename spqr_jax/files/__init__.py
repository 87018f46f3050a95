"""Everything a run keeps in its work directory, local or in a bucket: files, checkpoints, images and records.

`layout` names every file of a work directory, and `records` every column of the records. This room may use `params` and
`devices`. It knows nothing of models, methods and scores.
"""
