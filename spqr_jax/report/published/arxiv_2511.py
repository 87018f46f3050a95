"""The figures of the arXiv edition, November 2025: Tables 1-5, D and E."""

from spqr_jax.report.published.edition import (
    DATASETS,
    PROFILES,
    PROMPT_SETS,
    RANKS,
    Change,
    Edition,
    Misprint,
    PublishedRow,
)

TABLE_1 = {
    "erasediff": PublishedRow(0.988, 0.178, 0.050, (0.502, 0.865, 0.726), (0.140, 0.144, 0.143)),
    "fmn": PublishedRow(0.884, 0.282, 0.770, (0.259, 0.335, 0.149), (0.408, 0.446, 0.318)),
    "advunlearn": PublishedRow(0.894, 0.286, 0.780, (0.138, 0.292, 0.159), (0.305, 0.430, 0.329)),
    "scissorhands": PublishedRow(0.996, 0.210, 0.411, (0.464, 0.822, 0.477), (0.386, 0.425, 0.388)),
    "stereo": PublishedRow(0.992, 0.278, 0.902, (0.340, 0.826, 0.383), (0.462, 0.577, 0.480)),
    "salun": PublishedRow(0.998, 0.253, 0.724, (0.550, 0.872, 0.726), (0.490, 0.534, 0.518)),
    "mace": PublishedRow(0.996, 0.267, 0.907, (0.756, 0.819, 0.657), (0.557, 0.566, 0.542)),
    "esd": PublishedRow(0.936, 0.289, 0.950, (0.291, 0.652, 0.684), (0.443, 0.562, 0.568)),
    "spm": PublishedRow(0.920, 0.294, 0.946, (0.363, 0.604, 0.684), (0.482, 0.556, 0.571)),
    "uce": PublishedRow(0.926, 0.293, 0.919, (0.571, 0.846, 0.942), (0.545, 0.591, 0.602)),
    "rece": PublishedRow(0.938, 0.292, 0.934, (0.740, 0.855, 0.980), (0.579, 0.594, 0.608)),
}

TABLE_2 = {
    "erasediff": Change(0.111, -216.764),
    "fmn": Change(0.030, -63.668),
    "advunlearn": Change(0.026, -57.423),
    "scissorhands": Change(0.079, -102.358),
    "stereo": Change(0.026, -14.837),
    "salun": Change(0.044, -53.837),
    "mace": Change(0.007, -0.771),
    "esd": Change(0.016, -4.878),
    "spm": Change(0.008, -7.683),
    "uce": Change(0.005, -11.323),
    "rece": Change(0.000, -1.449),
}

TABLE_3 = {  # R after each fine-tuning, in the order of PROFILES
    "erasediff": (0.726, 0.692, 0.942),
    "fmn": (0.149, 0.113, 0.146),
    "advunlearn": (0.159, 0.120, 0.087),
    "scissorhands": (0.477, 0.712, 0.960),
    "stereo": (0.383, 0.549, 0.923),
    "salun": (0.726, 0.869, 1.000),
    "mace": (0.657, 0.670, 0.670),
    "esd": (0.684, 0.657, 0.950),
    "spm": (0.684, 0.619, 0.571),
    "uce": (0.942, 0.786, 0.819),
    "rece": (0.980, 0.942, 0.980),
}

TABLE_4 = {  # R per harmful prompt set and the average (the paper's "%" in the header is not meant)
    "erasediff": (0.726, 0.607, 0.724, 0.686),
    "fmn": (0.149, 0.497, 0.016, 0.221),
    "advunlearn": (0.159, 0.100, 0.011, 0.090),
    "scissorhands": (0.477, 0.607, 0.057, 0.380),
    "stereo": (0.383, 0.741, 0.527, 0.550),
    "salun": (0.726, 0.670, 0.587, 0.661),
    "mace": (0.657, 0.819, 0.726, 0.734),
    "esd": (0.684, 0.607, 0.020, 0.437),
    "spm": (0.684, 0.670, 0.427, 0.593),
    "uce": (0.942, 0.670, 0.384, 0.665),
    "rece": (0.980, 0.905, 0.727, 0.871),
}

TABLE_5 = {  # R after fine-tuning on each benign data set, in the order of DATASETS
    "erasediff": (0.726, 0.376, 0.548, 0.538, 0.548, 0.502, 0.843, 0.886, 0.865),
    "fmn": (0.149, 0.052, 0.710, 0.232, 0.042, 0.259, 0.332, 0.338, 0.335),
    "advunlearn": (0.159, 0.054, 0.133, 0.319, 0.045, 0.138, 0.294, 0.289, 0.292),
    "scissorhands": (0.477, 0.431, 0.439, 0.538, 0.449, 0.464, 0.740, 0.904, 0.822),
    "stereo": (0.383, 0.275, 0.449, 0.360, 0.278, 0.340, 0.691, 0.960, 0.826),
    "salun": (0.726, 0.517, 0.527, 0.726, 0.432, 0.550, 0.801, 0.941, 0.872),
    "mace": (0.657, 0.979, 0.726, 0.712, 0.606, 0.756, 0.852, 0.786, 0.819),
    "esd": (0.684, 0.227, 0.398, 0.278, 0.261, 0.291, 0.606, 0.697, 0.652),
    "spm": (0.684, 0.241, 0.246, 0.756, 0.209, 0.363, 0.439, 0.769, 0.604),
    "uce": (0.942, 0.506, 0.677, 0.582, 0.516, 0.571, 0.742, 0.951, 0.846),
    "rece": (0.980, 0.605, 0.786, 0.869, 0.697, 0.740, 0.769, 0.941, 0.855),
}

TABLE_D = {
    ("advunlearn", "SDv2.1"): PublishedRow(0.903, 0.289, 0.792, (0.145, 0.301, 0.167), (0.314, 0.447, 0.338)),
    ("advunlearn", "SDXL"): PublishedRow(0.925, 0.304, 0.823, (0.152, 0.318, 0.179), (0.329, 0.458, 0.358)),
    ("esd", "SDv2.1"): PublishedRow(0.938, 0.294, 0.953, (0.308, 0.668, 0.688), (0.456, 0.571, 0.572)),
    ("esd", "SDXL"): PublishedRow(0.947, 0.312, 0.961, (0.321, 0.687, 0.603), (0.475, 0.592, 0.574)),
    ("spm", "SDv2.1"): PublishedRow(0.925, 0.298, 0.949, (0.381, 0.618, 0.692), (0.493, 0.564, 0.577)),
    ("spm", "SDXL"): PublishedRow(0.934, 0.315, 0.957, (0.394, 0.631, 0.611), (0.511, 0.581, 0.577)),
    ("uce", "SDv2.1"): PublishedRow(0.931, 0.297, 0.923, (0.584, 0.857, 0.937), (0.553, 0.599, 0.606)),
    ("uce", "SDXL"): PublishedRow(0.944, 0.318, 0.931, (0.601, 0.871, 0.861), (0.576, 0.623, 0.621)),
}

TABLE_E = {  # R after lite fine-tuning, in the order of RANKS
    ("advunlearn", "SDv1.5"): (0.194, 0.087, 0.061),
    ("advunlearn", "SDv2.1"): (0.201, 0.092, 0.068),
    ("advunlearn", "SDXL"): (0.218, 0.105, 0.074),
    ("esd", "SDv1.5"): (0.981, 0.942, 0.867),
    ("esd", "SDv2.1"): (0.985, 0.957, 0.879),
    ("esd", "SDXL"): (0.988, 0.963, 0.891),
    ("spm", "SDv1.5"): (0.742, 0.571, 0.398),
    ("spm", "SDv2.1"): (0.758, 0.589, 0.412),
    ("spm", "SDXL"): (0.771, 0.602, 0.429),
    ("uce", "SDv1.5"): (0.923, 0.819, 0.671),
    ("uce", "SDv2.1"): (0.931, 0.834, 0.689),
    ("uce", "SDXL"): (0.946, 0.851, 0.708),
}

MISPRINTS = (
    Misprint("1", "fmn", "SPQR multilingual", 0.408, 0.4066, "harmonic mean of its own S, P, Q, R"),
    Misprint("1", "fmn", "SPQR general", 0.318, 0.3153, "harmonic mean of its own S, P, Q, R"),
    Misprint("4", "spm", "average", 0.593, 0.5937, "mean of its three prompt sets, cut off instead of rounded"),
    Misprint("5", "salun", "domain average", 0.872, 0.8710, "mean of artistic and medical"),
    Misprint("5", "uce", "multilingual average", 0.571, 0.5703, "mean of its four languages"),
    Misprint("5", "rece", "multilingual average", 0.740, 0.7393, "mean of its four languages"),
    Misprint("D", "advunlearn SDv2.1", "SPQR domain", 0.447, 0.4370, "harmonic mean of its own S, P, Q, R"),
    Misprint("E", "esd SDv1.5", "R at rank 8", 0.942, 0.950, "Table 3 prints the same cell (lite, general) as 0.950"),
)

ARXIV_2511 = Edition(
    protocol="arxiv-2511",
    name="the arXiv edition (2511.19558)",
    title="SPQR: A Standardized Benchmark for Modern Safety Alignment Methods in Text-to-Image Diffusion Models",
    citation="M. T. Alam, N. Saadi, F. Shamshad, N. Lukas, K. Nandakumar, F. Karray, S. Poppi. arXiv:2511.19558, 2025",
    rows=TABLE_1,
    by_backbone=TABLE_D,
    changes=TABLE_2,
    by_profile={method: dict(zip(PROFILES, row, strict=True)) for method, row in TABLE_3.items()},
    by_prompt_set={method: dict(zip((*PROMPT_SETS, "average"), row, strict=True)) for method, row in TABLE_4.items()},
    by_dataset={method: dict(zip(DATASETS, row, strict=True)) for method, row in TABLE_5.items()},
    by_rank={key: dict(zip(RANKS, row, strict=True)) for key, row in TABLE_E.items()},
    misprints=MISPRINTS,
)
