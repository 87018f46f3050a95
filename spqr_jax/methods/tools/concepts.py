"""A concept against a pipeline: whether its texts can be erased from it, and the fields that methods derive."""

import re
from collections.abc import Iterable

from spqr_jax.concepts import TEMPLATES, Concept
from spqr_jax.pipeline import Pipeline


def checked(concept: Concept, pipeline: Pipeline) -> Concept:
    """The concept, after making sure that there is something to erase, that every text has tokens, and that the text
    encoder reads all of those that closed forms work with.

    Raises ValueError naming the field and the text at fault.
    """
    if not concept.erase:
        raise ValueError(f"concept {concept.name!r}: `erase` is empty; name at least one text.")
    for field in ("erase", "prompts", "replacements", "retain", "anchors"):
        require_tokens(f"concept {concept.name!r}", field, getattr(concept, field), pipeline)
    length = pipeline.configs["text_encoder"]["max_position_embeddings"]
    for field, texts in (("erase", concept.erase), ("target", (concept.target,)), ("preserve", concept.preserve)):
        for text in texts:
            if (found := len(pipeline.tokenizers["tokenizer"](text).input_ids)) > length:
                raise ValueError(
                    f"concept {concept.name!r}: {text!r} in `{field}` takes {found} tokens, the text encoder reads "
                    f"{length}; shorten it."
                )
    return concept


def require_tokens(where: str, field: str, texts: Iterable[str], pipeline: Pipeline) -> None:
    """Raise ValueError naming the field for a text that tokenises to nothing."""
    for text in texts:
        if not _has_tokens(pipeline, text):
            raise ValueError(f"{where}: {text!r} in `{field}` has no tokens; use words the tokenizer knows.")


def _has_tokens(pipeline: Pipeline, text: str) -> bool:
    return bool(pipeline.tokenizers["tokenizer"](text, add_special_tokens=False).input_ids)


def mention(text: str) -> re.Pattern[str]:
    """An expression that finds a text as whole words, in any case of letters."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def completed(concept: Concept, pipeline: Pipeline, *needed: str) -> Concept:
    """The checked concept with every empty field derived from the others.

    needed: fields that must not be empty then; raises ValueError naming the field and what fills it.
    """
    checked(concept, pipeline)
    # "" may be preserved by a closed form, but is no benign prompt.
    retain = concept.retain or tuple(text for text in concept.preserve if _has_tokens(pipeline, text))
    full = concept._replace(
        prompts=concept.prompts or concept.erase,
        replacements=concept.replacements or retain or (concept.target,),
        retain=retain,
        anchors=concept.anchors or retain,
        templates=concept.templates or TEMPLATES,
    )
    for field in needed:
        if not getattr(full, field):
            raise ValueError(
                f"concept {concept.name!r}: `{field}` is empty and so is `preserve`; name benign prompts in `retain`."
            )
    if len(full.prompts) % len(full.erase):
        raise ValueError(
            f"concept {concept.name!r}: {len(full.prompts)} `prompts` for {len(full.erase)} texts in `erase`; "
            "expected a multiple, prompt i showing text i modulo their number."
        )
    for template in full.templates:
        if template.count("{}") != 1:
            raise ValueError(f"concept {concept.name!r}: template {template!r} must contain {{}} once.")
    return full


def expanded(concept: Concept, pipeline: Pipeline) -> Concept:
    """The checked concept that also erases its texts within each of its templates.

    A text's state in a caption is another one than alone. UCE's authors have five frames of their own for objects
    ("image of", "photo of", "portrait of", "picture of", "painting of"; `expand_prompts` in their script).
    """
    templates = completed(concept, pipeline).templates
    framed = (template.format(text) for template in templates for text in concept.erase)
    return checked(concept._replace(erase=tuple(dict.fromkeys([*concept.erase, *framed]))), pipeline)
