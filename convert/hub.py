"""Weights from the Hugging Face hub: the only place that downloads, and only when a source begins with "hub:"."""

import re
from collections.abc import Iterable
from pathlib import Path

from convert.tensors import PICKLED, preferred

PREFIX = "hub:"
_NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>[^/].*))?$")


def fetch(source: str) -> Path:
    """ "hub:owner/name", "hub:owner/name@revision", or either with "/file or folder" inside -> a local path.

    Raises ValueError for another form or when it names nothing, and what huggingface_hub raises when the hub cannot be
    reached or refuses.
    """
    match = _NAME.match(source.removeprefix(PREFIX))
    if match is None or ".." in source:
        raise ValueError(f"{source!r} is no hub source; expected hub:owner/name[@revision][/file or folder].")
    import huggingface_hub

    repo, revision, inside = match["repo"], match["revision"], (match["inside"] or "").rstrip("/")
    names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    chosen = wanted(names, inside)
    if not any(name.endswith((".safetensors", *PICKLED)) for name in chosen):
        held = [name for name in names if name.endswith((".safetensors", *PICKLED))]
        raise ValueError(f"{source} does not say which weights; name one of {', '.join(held) or 'none there are'}.")
    root = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen))
    return root / inside


def wanted(names: Iterable[str], inside: str = "") -> list[str]:
    """The files to download of a repository's: configs, and one set of weights per folder (or the file named).

    Repositories hold the same weights many times over; the one that `tensors.find_weights` would read is taken.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    chosen = []
    for folder, files in folders.items():
        path = f"{folder}/" if folder else ""
        if inside and folder != inside and inside not in [path + file for file in files]:
            continue
        chosen += [path + file for file in files if file.endswith((".json", ".txt"))]
        if inside in [path + file for file in files]:
            chosen.append(inside)
        elif weights := preferred(files):
            stem, sharded, _ = weights.partition(".safetensors.index" if ".safetensors" in weights else ".bin.index")
            ending = ".safetensors" if ".safetensors" in weights else ".bin"
            chosen += [
                path + f for f in files if (sharded and f.startswith(f"{stem}-") and f.endswith(ending)) or f == weights
            ]
    return list(dict.fromkeys(chosen))
