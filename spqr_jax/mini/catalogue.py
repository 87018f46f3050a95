"""Read the shipped assets of the emoji world: verify every file, then give names and places in the sheets."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

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
    expected = _checksums(folder).get(name)
    path = folder / name
    if not path.is_file():
        raise AssetError(f"{path} is missing; {REMEDY}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise AssetError(f"{path} ({len(content)} bytes) has sha256 {found}, expected {expected}; {REMEDY}")
    return content


@functools.cache
def catalogue(folder: Path = ASSETS) -> dict[str, Entry]:
    """Every emoji in the pack by code point string, in sheet order. Raises AssetError as ``read_asset`` does."""
    rows = json.loads(read_asset(CATALOGUE, folder))["emoji"]
    return {row["code"]: Entry(**{**row, "keywords": tuple(row["keywords"])}) for row in rows}


def name(code: str, language: str = "en") -> str:
    """The CLDR name of one emoji. ``language`` in {"en", "ar", "es", "fr", "hi"}."""
    return catalogue()[code].names[language]


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.is_file():
        raise AssetError(f"{path} is missing; {REMEDY}")
    fields = [line.split() for line in path.read_text().splitlines()]
    return {parts[1]: parts[0] for parts in fields if len(parts) == 2}
