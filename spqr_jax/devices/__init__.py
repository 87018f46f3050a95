"""Devices and processes: one mesh over all devices, several processes as one program, and stopping in order.

This room knows JAX alone and no other room of the package.
"""
