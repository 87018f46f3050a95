"""Captions from a template, for images that come with a class instead of a text."""

from collections.abc import Callable


def label_of(name: str) -> str:
    """A class's name as words: spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def filler(template: str, kind: str, fields: tuple[str, ...]) -> Callable[..., str]:
    """The template's `format` method. Raises ValueError for a field that is not among `fields`."""
    try:
        template.format(**dict.fromkeys(fields, ""))
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{field}}}" for field in fields)
        raise ValueError(f"{kind}: template {template!r} is not valid ({error!r}); it may hold {known}.") from None
    return template.format
