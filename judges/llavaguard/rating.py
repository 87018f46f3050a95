"""The text around LlavaGuard's verdict: the prompt, the forced prefix, the rating tokens, and parsing of replies.

LlavaGuard answers with JSON whose first field is `"rating": "Safe"` or `"rating": "Unsafe"`. The reply is forced up to
the rating's opening quote. One prefill then gives the logits of both words, and with them the verdict.
"""

import ast
import json
import re
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from judges.answers import SAFE, UNDECIDED, UNSAFE
from judges.session import JudgeError

FORCED = '{\n    "rating": "'
TO_CATEGORY = '",\n    "category": "'
RATINGS = {"Safe": SAFE, "Unsafe": UNSAFE}


class Prompt(NamedTuple):
    """The prompt as token ids.

    Attributes:
        before, after: the text before and after the image tokens.
        forced: the forced prefix of the reply, up to the rating.
        safe, unsafe: the two rating words.
        to_category: the text between a rating and its category.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    forced: tuple[int, ...]
    safe: int
    unsafe: int
    to_category: tuple[int, ...]


class Reply(NamedTuple):
    """A parsed reply. Without a rating the verdict is undecided, with a reason."""

    verdict: str
    category: str
    reason: str


def build_prompt(tokenizer: Tokenizer, template: str, policy: str, image_token: str) -> Prompt:
    """The prompt of a `template`, in which the image token and {policy} stand for image and policy.

    Raises JudgeError if one prefill could not give the verdict: if Safe or Unsafe is not one token after the forced
    prefix, or if the tokens of a text depend on the text after it.
    """
    if template.count(image_token) != 1 or "{policy}" not in template:
        raise JudgeError(f"prompt: expected one {image_token} and one {{policy}}, found {template!r}")
    if image_token in policy:
        raise JudgeError(f"policy: it contains {image_token}, which stands for the image; remove it")
    text = template.replace("{policy}", policy)
    image = encode(tokenizer, image_token)
    whole = encode(tokenizer, text)
    places = [i for i, token in enumerate(whole) if (token,) == image]
    if len(places) != 1:
        raise JudgeError(f"tokenizer: {image_token} must be one special token, found ids {list(image)}")
    forced = suffix(tokenizer, text, FORCED)
    words = {word: rating_token(tokenizer, text, word) for word in RATINGS}
    leads = {word: suffix(tokenizer, text + FORCED + word, TO_CATEGORY) for word in RATINGS}
    if len(set(leads.values())) != 1:
        raise JudgeError("tokenizer: the text after Safe and after Unsafe is cut into different tokens")
    before, after = whole[: places[0]], whole[places[0] + 1 :]
    return Prompt(before, after, forced, words["Safe"], words["Unsafe"], leads["Safe"])


def rating_token(tokenizer: Tokenizer, text: str, word: str) -> int:
    """The token of `word` after the forced prefix. Raises JudgeError if that is not exactly one token."""
    tokens = suffix(tokenizer, text + FORCED, word)
    if len(tokens) != 1:
        raise JudgeError(f"tokenizer: {word} is {len(tokens)} tokens after the forced prefix; use mode='generate'")
    return tokens[0]


def suffix(tokenizer: Tokenizer, text: str, more: str) -> tuple[int, ...]:
    """The tokens that `more` adds to `text`. Raises JudgeError if it changes the tokens of `text` itself."""
    start, whole = encode(tokenizer, text), encode(tokenizer, text + more)
    if whole[: len(start)] != start:
        raise JudgeError(f"tokenizer: {more!r} joins with the text before it; use mode='generate'")
    return whole[len(start) :]


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The token ids of `text`, without added special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def parse_reply(text: str) -> Reply:
    """The rating and category of a generated reply.

    They are read from the first {...} as JSON or a Python literal. Without one, as in a reply that was cut off, the
    rating is that of the field "rating", else the word Safe or Unsafe in the text; a text with both words, or neither,
    is undecided.
    """
    found = first_object(text)
    if found is not None and "rating" in found:
        verdict = RATINGS.get(str(found["rating"]).strip().capitalize())
        category = str(found.get("category", ""))
        return Reply(verdict, category, "") if verdict else Reply(UNDECIDED, category, "unknown rating in reply")
    stated = set(re.findall(r"""["']rating["']\s*:\s*["'](Safe|Unsafe)["'](?!\s*\|)""", text))
    unsafe = "Unsafe" in stated if stated else bool(re.search(r"\b[Uu]nsafe\b", text))
    safe = "Safe" in stated if stated else bool(re.search(r"\bSafe\b", text))
    if unsafe == safe:
        return Reply(UNDECIDED, "", "unparsable reply")
    return Reply(UNSAFE if unsafe else SAFE, "", "")


def first_object(text: str) -> dict[str, Any] | None:
    """The first {...} in `text` as JSON or a Python literal, text around it ignored; None if it is neither."""
    start, end = text.find("{"), text.rfind("}") + 1
    if start < 0:
        return None
    for read in (lambda: json.JSONDecoder().raw_decode(text, start)[0], lambda: ast.literal_eval(text[start:end])):
        try:
            value = read()
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None
