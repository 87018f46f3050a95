"""Weights from the Hugging Face hub: the only place that downloads, and only when a source begins with "hub:"."""

import re
from pathlib import Path

PREFIX = "hub:"
_NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>[^/].*))?$")
# What a pipeline is made of; other formats of the same weights stay where they are.
_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.bin"]


def fetch(source: str) -> Path:
    """ "hub:owner/name", "hub:owner/name@revision", or either with "/file or folder" inside -> a local path.

    Raises ValueError for another form; what huggingface_hub raises when the hub cannot be reached or refuses.
    """
    match = _NAME.match(source.removeprefix(PREFIX))
    if match is None or ".." in source:
        raise ValueError(f"{source!r} is no hub source; expected hub:owner/name[@revision][/file or folder].")
    from huggingface_hub import snapshot_download

    inside = match["inside"]
    patterns = [inside, f"{inside.rstrip('/')}/*"] if inside else _PATTERNS
    root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns)
    return Path(root) / inside if inside else Path(root)
