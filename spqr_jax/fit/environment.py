"""The environment in which other devices' compilers start on this machine. Set it before JAX is imported."""

# The host computes on its CPU, libtpu asks no metadata server, no CUDA device is looked for, and the CUDA plugin does
# not refuse a machine without one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
