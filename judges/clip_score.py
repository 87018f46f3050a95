"""CLIPScore: the raw cosine of CLIP's image and text embeddings, without prefix, clipping or factor.

Hessel et al. multiply by 2.5 and put "A photo depicts" before the text; torchmetrics multiplies by 100. The values that
SPQR reports (about 0.29) are raw cosines. The directory holds text.onnx, vision.onnx, tokenizer.json and
clip_score.json, as written by `python -m convert judges --kind clip`.
Letters: N images, T distinct texts, L context length (77), D embedding size.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from tokenizers import Tokenizer

from judges.answers import ClipScoreRecord, batches, check_images, judge_in_batches
from judges.preprocess import InputSpec, input_name, prepare
from judges.session import JudgeError, Session, SessionOptions, file_sha256, in_one_line, open_session
from judges.sidecar import read_sidecar, require_files, sidecar_identity

FILES = ("text.onnx", "vision.onnx", "tokenizer.json", "clip_score.json")
REQUIRED = ("model", "context_length", "bos_token_id", "eos_token_id", "pad_token_id", "image_size", "mean", "std")


class Tokens(NamedTuple):
    """input_ids int64 [T, L], and for each text whether it was cut to fit. The end-of-text token is always kept."""

    ids: np.ndarray
    truncated: np.ndarray


class VisionEncoder:
    """CLIP's image tower: images_u8 -> unit embeddings float32 [N, D]. CLIPScore and Q16 share it."""

    def __init__(self, session: Session, sidecar: dict[str, Any]):
        size = (int(sidecar["image_size"]),) * 2
        self.session = session.require(outputs=("image_embeds",))
        self.spec = InputSpec(size, "clip", tuple(sidecar["mean"]), tuple(sidecar["std"]))
        self.input = input_name(session, self.spec)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> float32 [N, D] of norm 1; not finite where the embedding is not."""
        feeds = {self.input: prepare(images, self.spec)}
        return unit(self.session.run(feeds, ["image_embeds"])[0])


class CLIPScore:
    """Prompt adherence: `score(images_u8, texts)` -> one ClipScoreRecord for each image and its text."""

    def __init__(self, vision: VisionEncoder, text: Session, tokenizer: Tokenizer, sidecar: dict[str, Any]):
        self.vision, self.text, self.tokenizer, self.sidecar = vision, text, tokenizer, sidecar
        self.batch_size = 32
        self.identity: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        *,
        batch_size: int = 32,
        **session_options: Unpack[SessionOptions],
    ) -> "CLIPScore":
        """Opens the four files in `directory`. Raises JudgeError with those that are missing or wrong."""
        directory = Path(directory)
        require_files(directory, FILES, "clip")
        sidecar = read_sidecar(directory / "clip_score.json", required=REQUIRED)
        vision = VisionEncoder(open_session(directory / "vision.onnx", **session_options), sidecar)
        text = open_session(directory / "text.onnx", **session_options).require(
            inputs=("input_ids",), outputs=("text_embeds",)
        )
        scorer = cls(vision, text, open_tokenizer(directory / "tokenizer.json"), sidecar)
        scorer.batch_size = batch_size
        scorer.identity = {
            "judge": "clip_score",
            "model": sidecar["model"],
            "formula": "cosine",
            "text": text.identity(),
            "vision": vision.session.identity(),
            "tokenizer_sha256": file_sha256(directory / "tokenizer.json"),
            **sidecar_identity(directory / "clip_score.json"),
        }
        return scorer

    def score(self, images: np.ndarray, texts: Sequence[str]) -> list[ClipScoreRecord]:
        """uint8 [N, H, W, 3] and N texts -> N records: the cosine of image i with text i.

        Raises ValueError unless there is one text for each image.
        """
        images = check_images(images)
        if len(texts) != len(images):
            raise ValueError(f"expected one text for each image, found {len(texts)} texts and {len(images)} images")
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenize(distinct)
        embeds = self.embed_tokens(tokens.ids)
        index = {text: i for i, text in enumerate(distinct)}
        rows = np.array([index[text] for text in texts], dtype=np.int64)
        cosines = judge_in_batches(
            images,
            lambda part: [(row, "") for row in self.vision(part)],
            lambda why: (None, why),
            batch_size=self.batch_size,
        )
        return [
            clip_record(row, embeds[i], bool(tokens.truncated[i]), reason)
            for (row, reason), i in zip(cosines, rows, strict=True)
        ]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """T texts -> unit embeddings float32 [T, D]."""
        return self.embed_tokens(self.tokenize(texts).ids)

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int64 [T, L] -> unit embeddings float32 [T, D]."""
        parts = [
            self.text.run({"input_ids": ids[part]}, ["text_embeds"])[0] for part in batches(len(ids), self.batch_size)
        ]
        return unit(np.concatenate(parts)) if parts else np.zeros((0, 1), np.float32)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts -> ids [T, L], begin and end token added, cut to the context length, padded as CLIP was trained."""
        length, sidecar = int(self.sidecar["context_length"]), self.sidecar
        ids = np.full((len(texts), length), sidecar["pad_token_id"], dtype=np.int64)
        truncated = np.zeros(len(texts), dtype=bool)
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            kept = encoding.ids[: length - 2]
            truncated[row] = len(encoding.ids) > len(kept)
            ids[row, : len(kept) + 2] = [sidecar["bos_token_id"], *kept, sidecar["eos_token_id"]]
        return Tokens(ids, truncated)


def clip_record(picture: np.ndarray | None, text: np.ndarray, truncated: bool, reason: str) -> ClipScoreRecord:
    """Unit embeddings [D] of an image and its text -> record. Without a finite cosine: NaN, with the reason."""
    cosine = float(np.dot(picture.astype(np.float64), text.astype(np.float64))) if picture is not None else float("nan")
    return ClipScoreRecord(cosine, truncated, reason or ("" if np.isfinite(cosine) else "non-finite embedding"))


def unit(embeddings: np.ndarray) -> np.ndarray:
    """[N, D] -> float32 [N, D] of norm 1 (computed in float32 also for float16 graphs); a zero row becomes NaN."""
    embeddings = embeddings.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, its own truncation and padding turned off.

    Raises JudgeError for another file.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise JudgeError(f"{path}: not a tokenizers file ({in_one_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
