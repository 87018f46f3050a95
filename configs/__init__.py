"""Experiments, one file each: the docstring holds the command, what it needs and what it costs."""
