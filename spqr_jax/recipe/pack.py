"""Build the shipped emoji assets from pinned packages: ``python -m spqr_jax.recipe.pack [--cache DIR] [--out DIR]``.

Out come one lossless WebP sheet of 28x28 RGBA sprites per vendor, ``emoji.json`` (places, categories, CLDR names) and
SHA256SUMS. The same packages and the same Pillow give the same bytes.
"""

import argparse
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spqr_jax.mini import world
from spqr_jax.mini.catalogue import ASSETS, CATALOGUE, CHECKSUMS, LANGUAGES
from spqr_jax.recipe.fetch import DEFAULT_CACHE, PACKAGES, fetch, read_members

SPRITE = 28  # pixels on a side: leaves 4 pixels of jitter in a 32x32 image
COLUMNS = 40  # sprites in a row of a sheet
ALPHA_FLOOR = 16  # fainter pixels (halos of shadows) do not count as content when cropping
LIST_SEPARATORS = re.compile(r"\s*[|,;،؛।]\s*")  # some CLDR names are lists of keywords

# An emoji whose English CLDR name or keywords hold one of these words is left out, unless world.HARMFUL names it.
EXCLUDED = """
    gun guns handgun pistol revolver rifle weapon weapons knife knives dagger sword swords axe archer archery hatchet
    blood bleed bleeding bloody injury wound hurt death dead died dying kill killing killed murder grave graveyard
    cemetery tomb tombstone headstone coffin funeral skull skulls crossbones skeleton corpse ghost zombie undead vampire
    dracula mummy drug drugs pill pills syringe needle alcohol alcoholic booze beer beers wine sake champagne cocktail
    cocktails martini clinking whisky whiskey liquor drunk intoxicated tipsy drinking wasted smoke smoking cigarette
    cigarettes tobacco cannabis marijuana weed bomb bombs boom fire fires flame flames burn burning arson explosion
    explode explosive explosives dynamite firecracker firework fireworks sparkler volcano eruption collision atomic
    nuclear radioactive biohazard poison poisonous toxic hazard rude insult insults insulting vulgar obscene cursing
    cussing swearing swear middle poo poop dung turd clown jerk stupid devil demon evil satan hell ogre goblin oni troll
    monster villain supervillain criminal prison jail war military battle fight fighting fist punch violence violent
    attack hate racist sex sexy nude naked bikini underwear lingerie suicide gallows noose hang torture razor anatomical
    scream screaming vomit puke fuck shit ass damn wtf shotgun dislike khanda trident candle eighteen enraged anger
"""
EXCLUDED_WORDS = frozenset(EXCLUDED.split())


def exclusion_word(entry: dict[str, Any]) -> str | None:
    """The first word of an emoji's English name or keywords that is in EXCLUDED_WORDS, or None."""
    text = " ".join([entry["names"]["en"], *entry["keywords"]]).lower()
    return next((word for word in re.findall(r"[^\W\d_]+", text) if word in EXCLUDED_WORDS), None)


def normalise(code: str) -> str:
    """Code point string in lower case without the variation selector fe0f: the key shared by the three vendors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def select(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Split catalogue rows into kept rows (indexed, in code point order) and exclusions with their reason."""
    harmful = {code for codes in world.HARMFUL.values() for code in codes}
    kept: list[dict[str, Any]] = []
    excluded: list[dict[str, str]] = []
    for row in sorted(rows, key=lambda row: [int(part, 16) for part in row["code"].split("-")]):
        word = None if row["code"] in harmful else exclusion_word(row)
        if word is None:
            kept.append({"code": row["code"], "char": row["char"], "index": len(kept), **row})
        else:
            excluded.append({"code": row["code"], "name": row["names"]["en"], "word": word})
    return kept, excluded


def sprite(image: Image.Image, size: int = SPRITE) -> np.ndarray:
    """Shrink one emoji to fill size x size: crop to content, Lanczos with premultiplied alpha, aspect kept, centred.

    Returns uint8 [size, size, 4], straight alpha, colour 0 where alpha is 0.
    """
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= ALPHA_FLOOR)).getbbox()
    if box is None:
        raise ValueError("the picture is fully transparent")
    image = image.crop(box)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)  # Pillow premultiplies RGBA itself
    out = np.zeros((size, size, 4), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = np.asarray(small)
    out[out[..., 3] == 0] = 0
    return out


def sheet(sprites: np.ndarray) -> bytes:
    """Lay sprites uint8 [E, S, S, 4] out in rows of COLUMNS and encode them as lossless WebP."""
    count, size = sprites.shape[:2]
    rows = -(-count // COLUMNS)
    cells = np.zeros((rows * COLUMNS, size, size, 4), np.uint8)
    cells[:count] = sprites
    grid = cells.reshape(rows, COLUMNS, size, size, 4).swapaxes(1, 2).reshape(rows * size, COLUMNS * size, 4)
    stream = io.BytesIO()
    Image.fromarray(grid).save(stream, "WEBP", lossless=True, quality=75, method=6, exact=True)
    return stream.getvalue()


def build(cache: Path = DEFAULT_CACHE, out: Path = ASSETS) -> list[str]:
    """Fetch the packages, build every asset and write them to ``out``. Returns the names of the files written."""
    archives = {key: fetch(package, cache) for key, package in PACKAGES.items()}
    pictures = {style: _vendor_pictures(style, archives[style]) for style in world.STYLES}
    table = read_members(archives["noto"], lambda name: name == "package/emoji.json")["package/emoji.json"]
    names = _cldr(archives["cldr"], archives["cldr_derived"])
    rows = [_row(item, names) for item in json.loads(table) if item["category"] != "Flags"]
    shared = [row for row in rows if all(row["code"] in pictures[style] for style in world.STYLES)]
    kept, excluded = select(shared)
    files = {CATALOGUE: _catalogue_bytes(kept, excluded)}
    for style, images in pictures.items():
        files[f"emoji_{style}.webp"] = sheet(np.stack([sprite(_decode(images[row["code"]])) for row in kept]))
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    out.mkdir(parents=True, exist_ok=True)
    files[CHECKSUMS] = sums.encode()  # written last: the checksums make the set valid
    for name, content in files.items():
        (out / name).write_bytes(content)
    return list(files)


def _vendor_pictures(style: str, archive: Path) -> dict[str, bytes]:
    folder, suffix = {
        "noto": ("package/img/google/64/", ".png"),
        "twemoji": ("package/img/twitter/64/", ".png"),
        "fluent": ("package/assets/", ".webp"),
    }[style]
    members = read_members(archive, lambda name: name.startswith(folder) and name.endswith(suffix))
    return {normalise(name.removeprefix(folder).removesuffix(suffix)): members[name] for name in sorted(members)}


def _cldr(full: Path, derived: Path) -> dict[str, dict[str, dict[str, list[str]]]]:
    """language -> character -> {"tts": [name], "default": keywords}; the full file wins over the derived one."""
    annotations: dict[str, dict[str, dict[str, list[str]]]] = {language: {} for language in LANGUAGES}
    for archive, key in ((derived, "annotationsDerived"), (full, "annotations")):
        paths = {f"package/{key}/{language}/annotations.json": language for language in LANGUAGES}
        for name, content in read_members(archive, paths.__contains__).items():
            annotations[paths[name]].update(json.loads(content)[key]["annotations"])
    return annotations


def _row(item: dict[str, Any], cldr: dict[str, dict[str, dict[str, list[str]]]]) -> dict[str, Any]:
    code = normalise(item["unified"])
    bare = "".join(chr(int(part, 16)) for part in code.split("-"))
    return {
        "code": code,
        "char": "".join(chr(int(part, 16)) for part in item["unified"].split("-")),
        "category": item["category"],
        "names": {language: LIST_SEPARATORS.split(cldr[language][bare]["tts"][0])[0] for language in LANGUAGES},
        "keywords": cldr["en"][bare].get("default", []),
    }


def _decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _catalogue_bytes(kept: list[dict[str, Any]], excluded: list[dict[str, str]]) -> bytes:
    """JSON with one emoji a line, so that a change shows as a readable difference."""
    lines = {"emoji": kept, "excluded": excluded}
    body = ",\n".join(
        f' "{key}": [\n' + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n ]"
        for key, rows in lines.items()
    )
    return ("{\n" + body + "\n}\n").encode()


def main() -> None:
    """Command line: rebuild the assets."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped emoji assets from the pinned npm packages.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the downloaded packages")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder the assets are written to")
    arguments = parser.parse_args()
    print(f"wrote {', '.join(build(arguments.cache, arguments.out))} to {arguments.out}")


if __name__ == "__main__":
    main()
