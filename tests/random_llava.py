"""A random LLaVA-OneVision of any size in transformers' layout; its tokenizer knows LlavaGuard's two ratings."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from judges.llavaguard.rating import FORCED, TO_CATEGORY

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


def save_tokenizer(directory: Path, policy: str) -> Tokenizer:
    """A byte-level BPE tokenizer that has seen enough replies to make one token of Safe and one of Unsafe."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    replies = [f'{FORCED}{word}{TO_CATEGORY}NA: None applying"\n}}' for word in ("Safe", "Unsafe")]
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*replies * 50, policy, "user assistant"], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def save(
    directory: Path,
    policy: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    *,
    grids: list[list[int]] | None = None,
    end: bool = True,
) -> None:
    """Weights of normal noise, tokenizer, preprocessor config and policy.txt in `directory`.

    vision, text: fields of SiglipVisionConfig and Qwen2Config; without vocab_size the tokenizer's. grids: sizes of
    tiled views, default transformers' own. end: whether a reply ends at <|im_end|>; else only at its greatest length.
    """
    tokenizer = save_tokenizer(directory, policy)
    places = {} if grids is None else {"image_grid_pinpoints": grids}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=transformers.Qwen2Config(**{"vocab_size": tokenizer.get_vocab_size()} | text),
        image_token_index=tokenizer.token_to_id("<image>"),
        video_token_index=tokenizer.token_to_id("<video>"),
        **places,
    )
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = tokenizer.token_to_id("<|im_end|>") if end else config.text_config.vocab_size
    model.save_pretrained(directory)
    processor(vision["image_size"], grids).save_pretrained(directory)
    (directory / "policy.txt").write_text(policy)


def processor(side: int, grids: list[list[int]] | None = None) -> LlavaOnevisionImageProcessorPil:
    """transformers' image processor for views of `side` pixels."""
    half = [0.5, 0.5, 0.5]
    places = {} if grids is None else {"image_grid_pinpoints": grids}
    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_mean=half, image_std=half, **places
    )
