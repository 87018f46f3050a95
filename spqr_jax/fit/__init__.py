"""Whether a config fits on accelerators that are not there: its programs, compiled for a target from shapes alone.

XLA's compilers for TPUs and NVIDIA GPUs run on any machine, and say how much memory a program takes. This room knows
the targets, and asks the rooms below for the programs that a run of a config compiles: it has no layer, training step
or sampler of its own. No weights, prompts or images are opened, and nothing is computed.
"""
