"""A decoder graph and its key-value cache, which stays on the device between steps (ONNX Runtime's IO binding).

Letters: B batch, T new tokens, P past tokens, D width, G key-value heads, K head size.
"""

from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from judges.session import JudgeError, Session

INPUTS = ("inputs_embeds", "attention_mask")
CONSTANTS = {"num_logits_to_keep": np.int64(1), "use_cache_branch": np.bool_(False)}


class Step(NamedTuple):
    """Logits float32 [B, vocabulary] of the last token; the cache, name -> OrtValue; and its length P + T."""

    logits: np.ndarray
    cache: dict[str, Any]
    length: int


class Decoder:
    """`step(embeds, before)` feeds T tokens after P cached ones. The rows of a batch have equal lengths."""

    def __init__(self, session: Session):
        self.session = session.require(inputs=INPUTS, outputs=("logits",))
        self.device = "cuda" if session.provider == "CUDAExecutionProvider" else "cpu"
        self.past = {name: value for name, value in session.inputs.items() if name.startswith("past_key_values.")}
        if not self.past or len(self.past) + 1 != len(session.outputs):
            raise JudgeError(f"{session.path}: not a decoder with a key-value cache; export it again")

    def step(self, embeds: np.ndarray, before: Step | None = None) -> Step:
        """embeds [B, T, D] -> the Step that follows `before`, or the first if it is None.

        Raises JudgeError if the graph has an input that no decoder of LlavaGuard has.
        """
        batch, tokens = embeds.shape[:2]
        past = before.length if before else 0
        binding = self.session.runtime.io_binding()
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((batch, past + tokens), np.int64),
            "position_ids": np.broadcast_to(np.arange(past, past + tokens), (batch, tokens)),
        }
        for name in self.session.inputs:
            if name in feeds:
                binding.bind_cpu_input(name, self.session.cast(name, feeds[name]))
            elif name in CONSTANTS:
                shape = [
                    1 if isinstance(axis, str) or axis is None else axis for axis in self.session.inputs[name].shape
                ]
                binding.bind_cpu_input(name, self.session.cast(name, np.full(shape, CONSTANTS[name])))
            elif name in self.past:
                binding.bind_ortvalue_input(name, before.cache[name] if before else self.empty(name, batch))
            else:
                raise JudgeError(f"{self.session.path}: unknown input {name}; export it again")
        for name in self.session.outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self.session.runtime.run_with_iobinding(binding)
        values = dict(zip(self.session.outputs, binding.get_outputs(), strict=True))
        logits = values.pop("logits").numpy()[:, -1].astype(np.float32)
        cache = {name.replace("present.", "past_key_values.", 1): value for name, value in values.items()}
        return Step(logits, cache, past + tokens)

    def empty(self, name: str, batch: int) -> Any:
        """An empty entry of the cache, [B, G, 0, K], of the graph's own type."""
        _, groups, _, size = self.past[name].shape
        cache = np.zeros((batch, int(groups or 0), 0, int(size or 0)), self.past[name].dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy(cache, self.device)
