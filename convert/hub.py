"""Weights from the Hugging Face hub. Only this file downloads, and only for a source that begins with "hub:"."""

import re
from collections.abc import Iterable
from pathlib import Path

from convert.tensors import PICKLED, preferred

PREFIX = "hub:"
_NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>[^/].*))?$")


def fetch(source: str) -> Path:
    """The local path of a hub source: "hub:owner/name[@revision][/file or folder]".

    Raises ValueError for another form, and for a source that does not name one set of weights. Raises the errors of
    huggingface_hub if the hub cannot be reached or refuses.
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
    """The files of a repository to download: configs, and one set of weights per folder, or the file `inside`.

    Repositories hold the same weights in several files. The one that `tensors.find_weights` would read is taken.
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
