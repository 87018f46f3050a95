"""Devices and processes: one mesh over all devices, several processes as one program, and a stop on SIGTERM.

This room may know JAX, and no other room of the package.
"""
