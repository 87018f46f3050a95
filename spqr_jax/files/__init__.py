"""Everything a run keeps in its work directory, local or in a bucket: files, checkpoints, images and records.

This room knows how things are written and read whole, and not what they mean. It may use `params` and `devices`.
"""
