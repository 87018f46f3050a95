"""The figures of the ECCV 2026 edition, as the authors' repository gives them.

R is printed for the general scenario only. S, Q, R and the cosine behind P are those of the arXiv edition: P is that
cosine over a ceiling, which the edition describes as the CLIPScore of the unaligned Stable Diffusion 3. The printed P
imply one of 0.300 for Stable Diffusion 1.5 and 2.1, and of 0.320 for SDXL. No cosine is printed for SD3 and FLUX, so
their ceilings are not known. Cosines of three digits over 0.320 would give the P of SD3, but not that of FLUX.
"""

from spqr_jax.report.published.edition import Edition, PublishedRow

# Percent before and after fine-tuning, for a model that looked safe. 6.4 fits the S of ESD; no printed R fits 78.5.
NSFW_RATES = (6.4, 78.5)


def _row(S: float, P: float, Q: float, R: float, *SPQR: float | None) -> PublishedRow:
    """A row from R in the general scenario, and SPQR in the general scenario, over languages and over domains."""
    general, languages, domains = SPQR
    return PublishedRow(S, P, Q, (None, None, R), (languages, domains, general))


ROWS = {
    "rece": _row(0.938, 0.973, 0.934, 0.980, 0.956, 0.886, 0.923),
    "uce": _row(0.926, 0.977, 0.919, 0.942, 0.940, 0.809, 0.915),
    "esd": _row(0.936, 0.963, 0.950, 0.684, 0.866, 0.607, 0.852),
    "spm": _row(0.920, 0.980, 0.946, 0.684, 0.865, 0.676, 0.830),
    "mace": _row(0.996, 0.890, 0.907, 0.657, 0.842, 0.878, 0.898),
    "salun": _row(0.998, 0.843, 0.724, 0.726, 0.809, 0.743, 0.848),
    "stereo": _row(0.992, 0.927, 0.902, 0.383, 0.689, 0.652, 0.908),
    "scissorhands": _row(0.996, 0.700, 0.411, 0.477, 0.575, 0.570, 0.658),
    "advunlearn": _row(0.894, 0.953, 0.780, 0.159, 0.411, 0.374, 0.582),
    "fmn": _row(0.884, 0.940, 0.770, 0.149, 0.392, 0.544, 0.617),
    "erasediff": _row(0.988, 0.593, 0.050, 0.726, 0.166, 0.162, 0.168),
}

BY_BACKBONE = {
    ("uce", "SDv2.1"): _row(0.931, 0.990, 0.923, 0.937, 0.945, None, None),
    ("uce", "SDXL"): _row(0.944, 0.994, 0.931, 0.861, 0.930, None, None),
    ("uce", "SD3"): _row(0.952, 0.975, 0.955, 0.850, 0.930, None, None),
    ("uce", "FLUX"): _row(0.955, 0.985, 0.958, 0.910, 0.951, None, None),
    ("esd", "SDXL"): _row(0.947, 0.975, 0.961, 0.603, 0.837, None, None),
    ("esd", "SD3"): _row(0.945, 0.969, 0.962, 0.559, 0.813, None, None),
}

ECCV_2026 = Edition(
    protocol="eccv-2026",
    name="the ECCV 2026 edition",
    title="SPQR: A Multi-Dimensional Benchmark for Safety Alignment under Benign Model Adaptation",
    citation="M. T. Alam, N. Saadi, F. Shamshad, N. Lukas, K. Nandakumar, F. Karray, S. Poppi. ECCV 2026",
    rows=ROWS,
    by_backbone=BY_BACKBONE,
    ceilings={"SDv1.5": 0.300, "SDv2.1": 0.300, "SDXL": 0.320, "SD3": None, "FLUX": None},
)
