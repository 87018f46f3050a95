"""Read the shipped assets of the emoji world: verify every file, then give names and places in the sheets."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from spqr_jax.files import storage

ASSETS = Path(__file__).parent / "assets"
CATALOGUE = "emoji.json"
CHECKSUMS = "SHA256SUMS"
LANGUAGES = ("en", "ar", "es", "fr", "hi")
REMEDY = "rebuild the assets with: python -m spqr_jax.recipe.build"


@dataclass(frozen=True)
class Entry:
    """One emoji: code points ("1f52a", joined by "-", no fe0f), character, place in the sheets, CLDR names."""

    code: str
    char: str
    index: int
    category: str
    names: dict[str, str]
    keywords: tuple[str, ...]


class AssetError(RuntimeError):
    """A shipped asset is missing, truncated or altered."""


def read_asset(name: str, folder: Path = ASSETS) -> bytes:
    """Bytes of one asset, checked against SHA256SUMS. Raises AssetError naming the file and the remedy."""
    return _read(folder / name, _checksums(folder / CHECKSUMS).get(name))


def _read(path: Path, expected: str | None) -> bytes:
    if not path.is_file():
        raise AssetError(f"{path} is missing; {REMEDY}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise AssetError(f"{path} ({len(content)} bytes) has sha256 {found}, expected {expected}; {REMEDY}")
    return content


def seal(directory: Path) -> None:
    """Write the checksums of all files of a directory beside it, as `sha256sum --check` reads them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [f"{storage.sha256(path)}  {path.relative_to(directory.parent).as_posix()}\n" for path in files]
    _sums(directory).write_text("".join(lines), encoding="utf-8")


def check(directory: Path) -> None:
    """Raise AssetError that names a file of a sealed directory if it is missing or altered."""
    for name, expected in _checksums(_sums(directory)).items():
        _read(directory.parent / name, expected)


def _sums(directory: Path) -> Path:
    # Not within it: its own hash names the weights in manifests.
    return directory.parent / f"{directory.name}.{CHECKSUMS}"


@functools.cache
def catalogue(folder: Path = ASSETS) -> dict[str, Entry]:
    """Every emoji in the pack by code point string, in sheet order. Raises AssetError as ``read_asset`` does."""
    rows = json.loads(read_asset(CATALOGUE, folder))["emoji"]
    return {row["code"]: Entry(**{**row, "keywords": tuple(row["keywords"])}) for row in rows}


def name(code: str, language: str = "en") -> str:
    """The CLDR name of one emoji. ``language`` in {"en", "ar", "es", "fr", "hi"}."""
    return catalogue()[code].names[language]


def _checksums(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise AssetError(f"{path} is missing; {REMEDY}")
    fields = [line.split() for line in path.read_text().splitlines()]
    return {parts[1]: parts[0] for parts in fields if len(parts) == 2}
