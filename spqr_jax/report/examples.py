"""Figure 2 of the paper: the same prompts and noise before and after benign fine-tuning, one column a method."""

import io

from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from spqr_jax.report import gallery
from spqr_jax.report.gallery import Group, Tile
from spqr_jax.report.reading import ReportedRun, headline_profile

PROMPTS, METHODS = 3, 6  # shown, at most
EDGES = {"unsafe": "#D55E00", "safe": "#009E73"}


def examples(run: ReportedRun, *, blur: bool = True) -> Figure | None:
    """A figure of prompts whose images changed their verdict, two rows each; None where no verdict changed."""
    profile, scenario = headline_profile(run), run.scenarios[0] if run.scenarios else ""
    groups = gallery.build(run, prompts=4 * PROMPTS).groups
    groups = [g for g in groups if g.key.role == "harmful" and g.changed][:PROMPTS]
    subjects = run.subjects[:METHODS]
    if not groups or not subjects:
        return None
    figure = Figure(figsize=(1.5 * len(subjects) + 0.6, 3.7 * len(groups)), layout="constrained")
    panels = figure.subplots(2 * len(groups), len(subjects), squeeze=False)
    for i, group in enumerate(groups):
        for j, subject in enumerate(subjects):
            for k, phase in enumerate(("before", "after")):
                axes = panels[2 * i + k][j]
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                tile = _tile(group, subject, phase, profile, scenario)
                _draw(axes, tile, blur)
                if j == 0:
                    axes.set_ylabel(f"{_short(group.prompt)}\n{phase}" if k == 0 else phase, fontsize=8)
                if i == k == 0:
                    axes.set_title(subject.replace("$", r"\$"), fontsize=9)
    shown = "; pictures blurred" if blur else ""
    figure.suptitle(f"Before and after fine-tuning: {profile}, {scenario}{shown}".replace("$", r"\$"), fontsize=10)
    return figure


def _tile(group: Group, subject: str, phase: str, profile: str | None, scenario: str) -> Tile | None:
    tiles = [tile for strip in group.strips if strip.subject == subject for tile in strip.tiles]
    wanted = ("", "") if phase == "before" else (profile, scenario)
    return next((t for t in tiles if t.phase == phase and (t.profile, t.scenario) == wanted), None)


def _draw(axes, tile: Tile | None, blur: bool) -> None:
    """One image with a frame and caption for its verdict. A missing image is an empty panel that says so."""
    if tile is None or tile.picture is None:
        axes.set_xlabel("no picture", fontsize=8)
        return
    with Image.open(io.BytesIO(tile.picture.data)) as image:
        picture = image.convert("RGB")
    if blur and tile.veiled:
        picture = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 9))
    axes.imshow(picture, interpolation="nearest" if tile.picture.small and not blur else "bilinear")
    axes.set_xlabel(tile.verdict, fontsize=8, color=EDGES.get(tile.verdict, "#555555"))
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set(visible=True, color=EDGES.get(tile.verdict, "#555555"), linewidth=2)


def _short(prompt: str) -> str:
    words = " ".join(prompt.split()).replace("$", r"\$")
    return words if len(words) <= 28 else f"{words[:27]}…"
