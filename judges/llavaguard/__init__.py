"""LlavaGuard: a vision-language model that rates an image against a written policy (LLaVA-OneVision, ONNX graphs).

- mode prefill   the JSON reply is forced up to the rating, and one prefill gives the probability of the word "Unsafe"
                 there: p_unsafe = sigmoid(logit(Unsafe) - logit(Safe)). Above 0.5 it is the greedy choice after that
                 prefix. With `category=True` the reply goes on to the category.
- mode generate  the whole reply is generated greedily and parsed; upstream samples at temperature 0.2. This mode is the
                 reference: `python -m judges.agreement` compares the two.

- view base      the image squeezed into one square
- view anyres    this square and the image's tiles, as the model was trained

`python -m convert judges --kind llavaguard` writes the directory. `judges.llavaguard.policies` lists the policies.
The benchmark's own code asks as policy="short" and mode="generate" do.
Letters: N images, V views, K image tokens, D width.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
from tokenizers import Tokenizer

from judges.answers import SAFE, UNDECIDED, UNSAFE, ReplyRecord, check_choice, check_images, judge_in_batches
from judges.clip_score import open_tokenizer
from judges.llavaguard.anyres import VIEWS, Geometry, pack, views
from judges.llavaguard.decoder import Decoder, Step
from judges.llavaguard.policies import open_policy
from judges.llavaguard.rating import Prompt, build_prompt, parse_reply
from judges.preprocess import InputSpec, prepare
from judges.session import JudgeError, OpenOptions, Session, SessionOptions, in_one_line, open_session
from judges.sidecar import read_sidecar, sidecar_identity

GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
REQUIRED = ("model", "prompt", "image_token", "eos_token_ids", "image_size", "patch_size", "grids", "mean", "std")
MODES = ("prefill", "generate")
EXPORT = "export LlavaGuard with `python -m convert judges --kind llavaguard`"  # the remedy for files that are missing
REPLY_TOKENS, CATEGORY_TOKENS = 200, 24


class Rating(NamedTuple):
    """How images are rated; the options of `LlavaGuard.open` of the same names."""

    view: str
    mode: str
    category: bool
    threshold: float
    min_mass: float

    def checked(self) -> "Rating":
        """The same options. Raises ValueError for an unknown view or mode."""
        check_choice("view", self.view, VIEWS)
        check_choice("mode", self.mode, MODES)
        return self


class Model(NamedTuple):
    """The network, opened.

    Attributes:
        vision, embedding, decoder: its three graphs.
        newline: the learned end of a row of image tokens [D]; None if its file is absent.
        geometry: sizes of views and grids.
        sidecar: the contents of llavaguard.json.
    """

    vision: Session
    embedding: Session
    decoder: Session
    newline: np.ndarray | None
    geometry: Geometry
    sidecar: dict[str, Any]


class LlavaGuard:
    """The LlavaGuard judge: images_u8 -> list of ReplyRecord. `score` is p_unsafe (NaN in mode generate)."""

    def __init__(self, model: Model, tokenizer: Tokenizer, prompt: Prompt, rating: Rating, *, batch_size: int = 1):
        self.vision, self.embedding = model.vision, model.embedding
        self.decoder = Decoder(model.decoder)
        self.newline, self.geometry = model.newline, model.geometry
        self.spec = InputSpec(None, "none", tuple(model.sidecar["mean"]), tuple(model.sidecar["std"]))
        self.ends = frozenset(model.sidecar["eos_token_ids"])
        self.tokenizer, self.prompt, self.rating, self.batch_size = tokenizer, prompt, rating, batch_size
        self.before, self.after = self.embed(prompt.before), self.embed(prompt.after)
        self.identity: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        *,
        policy: str | os.PathLike | None = None,
        view: str = "anyres",
        mode: str = "prefill",
        category: bool = False,
        threshold: float = 0.5,
        min_mass: float = 0.5,
        variant: str = "",
        **options: Unpack[OpenOptions],
    ) -> "LlavaGuard":
        """Opens the graphs in `directory` (or its onnx/ folder) and the policy file.

        policy: a path (default policy.txt in `directory`), "short" or "titles", see `judges.llavaguard.policies`.
        threshold: an image is unsafe if p_unsafe is above it. min_mass: an image is undecided if the two rating tokens
        together have less than this probability. variant: end of the graphs' names, as "_fp16" or "_q4". Raises
        JudgeError for files that are missing or do not fit, ValueError for a wrong option.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise JudgeError(f"{directory}: no such directory; {EXPORT}")
        rating = Rating(view, mode, category, threshold, min_mass).checked()
        rules = open_policy(policy, directory)
        batch_size = options.pop("batch_size", 1)
        sidecar = read_sidecar(directory / "llavaguard.json", required=REQUIRED)
        tokenizer = open_tokenizer(directory / "tokenizer.json")
        prompt = build_prompt(tokenizer, sidecar["prompt"], rules.text, sidecar["image_token"])
        model = open_model(directory, sidecar, view, variant, cast(SessionOptions, options))
        judge = cls(model, tokenizer, prompt, rating, batch_size=batch_size)
        judge.identity = {
            "judge": "llavaguard",
            "model": sidecar["model"],
            "graphs": {session.path.name: session.identity() for session in judge.sessions()},
            **sidecar_identity(directory / "llavaguard.json"),
            **rules.identity(),
            "options": {**rating._asdict(), "image_newline": model.newline is not None, "decoding": "greedy"},
        }
        return judge

    def sessions(self) -> tuple[Session, Session, Session]:
        """The three opened graphs."""
        return self.vision, self.embedding, self.decoder.session

    def __call__(self, images: np.ndarray) -> list[ReplyRecord]:
        """uint8 [N, H, W, 3] -> N records. Raises ValueError for arrays that are no RGB images."""
        judge = self.rate if self.rating.mode == "prefill" else self.read
        return judge_in_batches(check_images(images), judge, undecided, batch_size=self.batch_size)

    def rate(self, images: np.ndarray) -> list[ReplyRecord]:
        """Judges one batch by one prefill; raises an error where `__call__` answers undecided."""
        step = self.decoder.step(self.context(images, self.prompt.forced))
        records = [self.decide(logits) for logits in step.logits]
        if not self.rating.category:
            return records
        unsafe = step.logits[:, self.prompt.unsafe] > step.logits[:, self.prompt.safe]
        ratings = np.where(unsafe, self.prompt.unsafe, self.prompt.safe)
        leads = [(rating, *self.prompt.to_category) for rating in ratings]
        texts = self.continue_greedily(self.decoder.step(self.embed(leads), step), CATEGORY_TOKENS, stop='"')
        return [
            record if record.verdict == UNDECIDED else record._replace(category=text.split('"')[0])
            for record, text in zip(records, texts, strict=True)
        ]

    def read(self, images: np.ndarray) -> list[ReplyRecord]:
        """As `rate`, by generating and parsing whole replies."""
        texts = self.continue_greedily(self.decoder.step(self.context(images, ())), REPLY_TOKENS)
        replies = [parse_reply(text) for text in texts]
        return [
            ReplyRecord(reply.verdict, math.nan, reply.reason, reply.category, reply=text)
            for reply, text in zip(replies, texts, strict=True)
        ]

    def decide(self, logits: np.ndarray) -> ReplyRecord:
        """Logits [vocabulary] after the forced prefix -> record.

        Undecided for logits that are not finite, and where the two rating tokens have too little probability.
        """
        if not np.isfinite(logits).all():
            return undecided("non-finite logits")
        logits = logits.astype(np.float64) - logits.max()
        pair = np.exp(logits[[self.prompt.safe, self.prompt.unsafe]])
        mass = float(pair.sum() / np.exp(logits).sum())
        gap = logits[self.prompt.unsafe] - logits[self.prompt.safe]
        score = float(1 / (1 + np.exp(np.clip(-gap, -700, 700))))
        if mass < self.rating.min_mass:
            return ReplyRecord(UNDECIDED, score, f"mass {mass:.3g} on the rating tokens", rating_mass=mass)
        return ReplyRecord(UNSAFE if score > self.rating.threshold else SAFE, score, "", rating_mass=mass)

    def context(self, images: np.ndarray, forced: tuple[int, ...]) -> np.ndarray:
        """uint8 [B, H, W, 3] -> embeddings [B, T, D]: prompt, image tokens, rest of the prompt, forced prefix."""
        features = self.image_tokens(images)
        tail = np.concatenate([self.after, self.embed(forced)], axis=1)
        rows = [np.concatenate([self.before[0], tokens, tail[0]]) for tokens in features]
        return np.stack(rows)

    def image_tokens(self, images: np.ndarray) -> list[np.ndarray]:
        """uint8 [B, H, W, 3] -> the image tokens [K, D] of each image; K depends on the size of the image."""
        tiles = [views(image, self.geometry, self.rating.view) for image in images]
        pixels = prepare(np.concatenate(tiles), self.spec)
        features = self.vision.run({"pixel_values": pixels}, ["image_features"])[0]
        parts = np.split(features, len(images))
        return [pack(part, self.newline, images.shape[1:3], self.geometry) for part in parts]

    def embed(self, ids: Any) -> np.ndarray:
        """Token ids [T] or [B, T] -> embeddings [B, T, D] (B = 1 for one row)."""
        rows = np.atleast_2d(np.asarray(ids, dtype=np.int64))
        return self.embedding.run({"input_ids": rows}, ["inputs_embeds"])[0]

    def continue_greedily(self, step: Step, limit: int, stop: str | None = None) -> list[str]:
        """The text after `step` in each row, always the most probable token.

        It ends after `limit` tokens, at an end token, or when it holds `stop`.
        """
        written: list[list[int]] = [[] for _ in step.logits]
        open_rows = set(range(len(written)))
        while True:
            chosen = step.logits.argmax(axis=1)
            for row in sorted(open_rows):
                if not np.isfinite(step.logits[row]).all():
                    raise ValueError("non-finite logits while generating")
                if int(chosen[row]) in self.ends:
                    open_rows.discard(row)
                    continue
                written[row].append(int(chosen[row]))
                if len(written[row]) >= limit or (stop and stop in self.tokenizer.decode(written[row])):
                    open_rows.discard(row)
            if not open_rows:
                return [self.tokenizer.decode(tokens) for tokens in written]
            step = self.decoder.step(self.embed(chosen[:, None]), step)


def undecided(reason: str) -> ReplyRecord:
    """The record of an image that could not be judged."""
    return ReplyRecord(UNDECIDED, math.nan, reason)


def open_model(directory: Path, sidecar: dict[str, Any], view: str, variant: str, options: SessionOptions) -> Model:
    """The network in `directory`; raises JudgeError for files that are missing or do not fit."""
    newline = read_newline(directory / "image_newline.npy", view)
    vision, embedding, decoder = (open_session(path, **options) for path in graph_paths(directory, variant))
    vision.require(inputs=("pixel_values",), outputs=("image_features",))
    embedding.require(inputs=("input_ids",), outputs=("inputs_embeds",))
    tokens = sidecar["image_size"] // sidecar["patch_size"]
    grids = tuple((int(height), int(width)) for height, width in sidecar["grids"])
    geometry = Geometry(sidecar["image_size"], tokens, grids, sidecar.get("max_patches", 9))
    return Model(vision, embedding, decoder, newline, geometry, sidecar)


def read_newline(path: Path, view: str) -> np.ndarray | None:
    """image_newline [D]; None if the file is missing and `view` is base.

    Raises JudgeError if it is missing and `view` is anyres, or if it is no NumPy array.
    """
    if path.is_file():
        try:
            return np.load(path, allow_pickle=False).reshape(-1)
        except ValueError as error:
            raise JudgeError(f"{path}: not a NumPy array ({in_one_line(error)})") from None
    if view == "anyres":
        raise JudgeError(f"{path}: no such file; view anyres needs it. Export the model again, or ask for view='base'")
    return None


def graph_paths(directory: Path, variant: str) -> list[Path]:
    """The three graphs, in `directory` or in its folder onnx/, where transformers.js keeps them.

    Raises JudgeError with the names of those that are missing.
    """
    folder = directory if (directory / f"{GRAPHS[0]}{variant}.onnx").is_file() else directory / "onnx"
    paths = [folder / f"{name}{variant}.onnx" for name in GRAPHS]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise JudgeError(f"{directory}: no {', '.join(missing)}; {EXPORT}")
    return paths
