"""A run of the benchmark: a config is checked, everything it names is opened, and its stages are carried out.

`command` does all of it for launch.py. This room may use every other room of the package except `recipe`, and `judges`
and `convert`. It is used by commands alone: launch.py, the benchmarks, the recipe, and `python -m spqr_jax.data`.
"""
