"""Medical images with neutral captions. Captions say nothing of the patient, and of findings only if a template asks.

The paper (section B.2) mixes two sets "paired with neutral diagnostic descriptions", "free of pathology-specific
triggering content". Its captions are not published, so these templates are ours.
"""

from pathlib import Path

from spqr_jax.data import tables
from spqr_jax.data.source import Source, first_column, of_files, pictures_under
from spqr_jax.data.templates import filler, label_of

CHEST_TABLES = ("Data_Entry_2017*.csv", "*Data_Entry*.csv")
CHEST_TEMPLATE = "a frontal chest X-ray, {view} view"
MRI_TEMPLATE = "a magnetic resonance scan of a brain"
VIEWS = {"PA": "posteroanterior", "AP": "anteroposterior"}
SPLITS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def open_chest_xray(path: Path, *, template: str = CHEST_TEMPLATE, split: str = "") -> Source:
    """ChestX-ray14: Data_Entry_2017.csv (or _v2020), and the images anywhere under the same folder.

    Images that are both in the table and in the folder are taken, so a part of them is enough. template: may hold
    {view} and {findings} (lower case, joined by "and"). split: "train" or "test", by the lists that come with the data.
    The columns about patients are never read. Raises FileNotFoundError without the table, ValueError for an unknown
    split.
    """
    table = next((found for pattern in CHEST_TABLES for found in sorted(path.glob(pattern))), None)
    if table is None:
        raise FileNotFoundError(f"{path} holds no Data_Entry_2017.csv; expected the folder of ChestX-ray14.")
    caption = filler(template, "chestxray", ("view", "findings"))
    rows = tables.read_rows(table)
    columns = list(rows[0])
    name = first_column("", ("Image Index",), columns, str(table), "file")
    view = first_column("", ("View Position",), columns, str(table), "view")
    findings = first_column("", ("Finding Labels",), columns, str(table), "findings")
    found = {picture.name: picture for picture in pictures_under(path)}
    wanted = found.keys() if not split else _split(path, split)
    pairs = [
        (found[row[name]], caption(view=VIEWS.get(row[view], row[view]), findings=_findings(row[findings])))
        for row in rows
        if row[name] in found and row[name] in wanted
    ]
    return of_files(f"chestxray:{path}", pairs, f"template {template!r}")


def _split(path: Path, split: str) -> set[str]:
    if split not in SPLITS:
        raise ValueError(f"chestxray: ?split={split} is unknown; expected {' or '.join(SPLITS)}.")
    return set(tables.read_text(path / SPLITS[split]).split())


def _findings(labels: str) -> str:
    return " and ".join(label_of(label).lower() for label in str(labels).split("|"))


def open_brain_mri(path: Path, *, template: str = MRI_TEMPLATE) -> Source:
    """Brain MRI in class folders at any depth: Training/glioma, Testing/notumor, yes, no and the like.

    template: may hold {label}, the folder's name in lower case. Raises ValueError without such a folder.
    """
    caption = filler(template, "brainmri", ("label",))
    pairs = [(p, caption(label=label_of(p.parent.name).lower())) for p in pictures_under(path) if p.parent != path]
    if not pairs:
        raise ValueError(f"{path} holds no folders of images; expected one folder a class (glioma, notumor, ...).")
    return of_files(f"brainmri:{path}", pairs, f"template {template!r}")
