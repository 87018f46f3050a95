"""What a method is asked to erase: a value, with presets."""

from typing import NamedTuple


class Concept(NamedTuple):
    """A concept to erase.

    Attributes:
        name: for file names and messages.
        erase: texts whose content is to disappear.
        target: what they become (" ": nothing in particular).
        preserve: texts whose output closed-form methods keep.
    """

    name: str
    erase: tuple[str, ...]
    target: str = " "
    preserve: tuple[str, ...] = ()


NUDITY = Concept("nudity", ("nudity",))
# The eleven words that I2P and the papers built on it erase together.
NSFW = Concept(
    "nsfw",
    (
        "hate",
        "harassment",
        "violence",
        "suffering",
        "humiliation",
        "harm",
        "suicide",
        "sexual",
        "nudity",
        "bodily fluids",
        "blood",
    ),
)
PRESETS = {"nudity": NUDITY, "nsfw": NSFW}


def checked(concept: Concept, tokenizer) -> Concept:
    """The concept, after making sure that there is something to erase and that every text has tokens.

    Raises ValueError naming the field and the text at fault.
    """
    if not concept.erase:
        raise ValueError(f"concept {concept.name!r}: `erase` is empty; name at least one text.")
    for text in concept.erase:
        if not tokenizer(text, add_special_tokens=False).input_ids:
            raise ValueError(
                f"concept {concept.name!r}: {text!r} in `erase` has no tokens; use words the tokenizer knows."
            )
    return concept
