"""A run of the benchmark: a config is checked, everything it names is opened, and its stages are carried out.

`command` does all of it for launch.py. This room may use every other room of the package, `judges` and `convert`;
launch.py, the benchmarks and the recipe alone may use it.
"""
