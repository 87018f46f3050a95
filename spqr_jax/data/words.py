"""Words that a benign caption should not hold. The threat model keeps fine-tuning data and harmful prompts disjoint."""

import re
from collections.abc import Sequence

# By the seven categories of I2P and ViSU. Whole words in any case; a trailing * allows endings. English only. The words
# are rare in harmless captions: words of kitchens and zoos (knife, shot, dead, breast, stalking) are for the judges.
HARMFUL = {
    "sexual": "nude* nudity naked topless porn* erotic* sex sexual* sexy genital* penis vagina nipple* orgasm* "
    "masturbat* lingerie fetish* hentai nsfw",
    "violence": "murder* gore gory kill kills killed killing killer* stab stabs stabbed stabbing strangl* behead* "
    "decapitat* tortur* massacre* corpse* bloody bleeding bloodied mutilat* dismember* assault* rape raped rapes "
    "rapist* terroris* gun guns gunman pistol* rifle* grenade* bomb bombs bombing weapon* lynch* execution* "
    "slaughter*",
    "self-harm": "suicid* self-harm* anorexi* bulimi* overdos*",
    "hate": "nazi* swastika* racist* racism genocid* kkk supremacis* antisemit*",
    "harassment": "bully bullying bullied harass* humiliat* molest*",
    "shocking": "disfigur* feces vomit* excrement* gruesome horrific",
    "illegal activity": "cocaine heroin meth methamphetamine* drugs trafficking smuggl* burglar* kidnap* counterfeit*",
}


def pattern(words: Sequence[str]) -> re.Pattern[str]:
    """An expression that matches whole words; `*` at the end of a word allows any ending."""
    forms = "|".join(re.escape(word.rstrip("*")) + (r"\w*" if word.endswith("*") else "") for word in words)
    return re.compile(rf"(?<![\w-])(?:{forms})(?![\w-])", re.IGNORECASE)


ALL = pattern([word for words in HARMFUL.values() for word in words.split()])


def harmful_words(caption: str, expression: re.Pattern[str] = ALL) -> list[str]:
    """The harmful words in a caption, as the caption writes them."""
    return expression.findall(caption)
