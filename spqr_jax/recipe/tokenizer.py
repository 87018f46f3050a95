"""The emoji world's tokenizer: CLIP's algorithm and file layout, with merges learned on captions in five languages."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
# CLIP's word pattern.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn(texts: list[str], merges: int, length: int, folder: Path) -> CLIPTokenizer:
    """Learn byte-pair merges and write vocab.json, merges.txt and the tokenizer's config to `folder`.

    The vocabulary is CLIP's: 256 bytes, 256 bytes that end a word, one entry a merge, start and end of text (id order).
    The same texts give the same files.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Pairs that are equally frequent are merged in the order of their ids. Without ids of their own, bytes that end a
    # word get them in the order of a hash table, another one in every process.
    single = [*alphabet, *(a + SUFFIX for a in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(single) + merges, special_tokens=single, end_of_word_suffix=SUFFIX, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    pairs = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:merges]
    vocab = [*single, *dict.fromkeys(a + b for a, b in pairs), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # transformers would read it in place of the two files below
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in pairs)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=length, local_files_only=True)
    tokenizer.save_pretrained(str(folder))
    return tokenizer
