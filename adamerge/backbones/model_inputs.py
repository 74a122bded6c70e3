"""Texts and images to the inputs of a transformers model, by the files in its folder."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.composed import tell_once
from adamerge.data.batch import pad
from adamerge.data.texts import Text
from adamerge.errors import InputError, shorten
from adamerge.system.reading import check_texts

_UNLIMITED = 1_000_000  # tokens; tokenizers without a limit state 1e30
ANSWER, TARGETS = "_answer", "_targets"
_PADS = {"labels": -100, TARGETS: -100}  # values that padding has, by key; input_ids have the tokenizer's


@dataclass(frozen=True)
class ModelInputs:
    """The way from an item of a data set to an input, a mapping of tensors without batch axis.

    Args:
        folder: With tokenizer, image processor or processor.
        is_causal: Whether the answer follows the prompt in one text.
        is_encoder_decoder: Whether the answer is the decoder's.
        decoder_start: The token that the decoder begins with.
        argument: The network's main argument, for items that are tensors.
        max_length: Most tokens that the model takes; None for no limit.
        truncates: Whether longer texts are cut; else they are refused.
        truncation_side: Which end is cut off, ``right`` or ``left``; None for the tokenizer's.
    """

    folder: Path
    is_causal: bool = False
    is_encoder_decoder: bool = False
    decoder_start: int | None = None
    argument: str = "input_ids"
    max_length: int | None = None
    truncates: bool = True
    truncation_side: str | None = None

    def __call__(self, item: Any) -> Mapping[str, Tensor]:
        """Return an item's input.

        Args:
            item: A text (:class:`~adamerge.data.texts.Text` or str), an image, a mapping with ``text`` and ``image``,
                a tensor, or a mapping of tensors, which stays.

        Raises:
            InputError: If the folder lacks what the item needs, or a text is too long.
        """
        if isinstance(item, Tensor):
            return {self.argument: item}
        if isinstance(item, (str, Text)):
            return self._text(item if isinstance(item, Text) else Text(item))
        if not isinstance(item, Mapping):
            return _tensors(self._images(images=item, return_tensors="pt"))
        if all(isinstance(value, Tensor) for value in item.values()):
            return item
        if unknown := set(item) - {"text", "image"}:
            raise InputError(f"backbone: expected an item with text and image, found {shorten(map(str, unknown))}.")
        text = item["text"].prompt if isinstance(item["text"], Text) else item["text"]
        if not isinstance(text, str):
            text = self._processor.apply_chat_template(list(text), add_generation_prompt=True)
        return _tensors(self._processor(text=text, images=item["image"], return_tensors="pt"))

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer.

        Raises:
            InputError: If there is none.
        """
        from transformers import AutoTokenizer

        tokenizer = self._loaded(AutoTokenizer, "tokenizer", "tokenizer.json and tokenizer_config.json")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    f"{self.folder}: its tokenizer has neither a pad token nor an end of text, one of which fills up "
                    "shorter texts. Give pad_token in tokenizer_config.json."
                )
            tokenizer.pad_token = tokenizer.eos_token
            tell_once(
                f"The tokenizer has no pad token: {tokenizer.eos_token!r} fills up shorter texts, and never counts."
            )
        if self.truncation_side is not None:
            tokenizer.truncation_side = self.truncation_side
        return tokenizer

    @cached_property
    def _images(self) -> Any:
        from transformers import AutoImageProcessor

        return self._loaded(AutoImageProcessor, "image processor", "preprocessor_config.json")

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return self._loaded(AutoProcessor, "processor", "processor_config.json")

    def _loaded(self, auto: Any, kind: str, files: str) -> Any:
        check_texts(self.folder)
        try:
            return auto.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever the library makes of a folder without them
            first = " ".join(str(error).split()).split(". ")[0]
            raise InputError(
                f"{self.folder}: no {kind} that transformers can read ({first}). Copy the base's there: {files}; or "
                "name a folder that has one: backbone.model=FOLDER."
            ) from error

    @cached_property
    def pad_token(self) -> int:
        """The token that fills up shorter texts."""
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def _cut(self) -> list[int]:
        """How often a text was cut."""
        return [0]

    def count_cut(self, items: Iterable[Any]) -> int:
        """Return how many of the items are texts that are cut."""
        count = 0
        for item in items:
            before = self._cut[0]
            self(item)
            count += self._cut[0] > before
        return count

    @cached_property
    def limit(self) -> int:
        """Most tokens of a text."""
        stated = int(min(self.tokenizer.model_max_length, _UNLIMITED))
        return min(stated, self.max_length or _UNLIMITED)

    def _text(self, text: Text) -> Mapping[str, Tensor]:
        if self.is_encoder_decoder:
            return self._pair(self._prompt(text, self.limit), text.answer)
        answer = self._ids(text.answer, self.limit - 1, special=False) if text.answer and self.is_causal else []
        prompt = self._prompt(text, self.limit - len(answer))
        if answer and prompt[-1:] == [self.tokenizer.eos_token_id]:
            prompt = prompt[:-1]  # the answer goes on where the prompt ends
        ids = [*prompt, *answer]
        if not ids:
            raise InputError("data: an empty text has no tokens; leave it out.")
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        if self.is_causal:
            tensors[ANSWER] = torch.arange(len(ids)) >= len(prompt)
        return tensors

    def _pair(self, prompt: list[int], answer: str | None) -> Mapping[str, Tensor]:
        """Return a text and what the decoder has said of its answer."""
        start = self.tokenizer.pad_token_id if self.decoder_start is None else self.decoder_start
        targets = self._ids(answer, self.limit, special=True) if answer else []
        said = [start, *targets[:-1]]  # the last token is only predicted
        return {
            "input_ids": torch.tensor(prompt),
            "attention_mask": torch.ones(len(prompt), dtype=torch.long),
            "decoder_input_ids": torch.tensor(said),
            "decoder_attention_mask": torch.ones(len(said), dtype=torch.long),
            TARGETS: torch.tensor(targets or [_PADS[TARGETS]]),
        }

    def _prompt(self, text: Text, limit: int) -> list[int]:
        """Return the tokens of a prompt; of a chat, by the tokenizer's template."""
        if not text.is_chat:
            return self._ids(str(text.prompt), limit, special=True)
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.folder}: its tokenizer has no chat template, which prompts of messages need. Put the base's "
                "chat_template.jinja there, or give prompts as texts."
            )
        messages = [dict(message) for message in text.prompt if isinstance(message, Mapping)]
        shown = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._ids(shown, limit, special=False)

    def _ids(self, text: str, limit: int, *, special: bool) -> list[int]:
        """Return the tokens of a text; of a longer one than the limit as the tokenizer cuts it, or refuse it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return ids
        if not self.truncates:
            raise InputError(
                f"data: a text has {len(ids)} tokens, more than {limit}. Set backbone.max_length, if it takes more, "
                "or backbone.long_texts=truncate."
            )
        self._cut[0] += 1
        tell_once(
            f"Texts of more than {self.limit} tokens are cut; see backbone.max_length, backbone.long_texts and "
            "backbone.truncation_side.",
            logging.WARNING,
        )
        # The library keeps the special tokens at the end, which slices would lose.
        cut = self.tokenizer(text, add_special_tokens=special, truncation=True, max_length=limit, verbose=False)
        kept: list[int] = cut["input_ids"]
        return kept


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a processor's tensors without the batch axis."""
    return {str(key): value[0] for key, value in values.items() if isinstance(value, Tensor)}


def collate(samples: Sequence[Mapping[str, Tensor]], inputs: ModelInputs, *, has_positions: bool) -> dict[str, Tensor]:
    """Return one batch of samples, padded to the longest.

    Args:
        samples: Mappings of tensors without batch axis, of the same keys.
        inputs: Says the token and the side of the padding.
        has_positions: Whether the network takes ``position_ids``, with which padding on the left is exact.
    """
    is_left = has_positions and inputs.tokenizer.padding_side == "left" and "input_ids" in samples[0]
    texts = [key for key in samples[0] if key.endswith("input_ids")]
    is_ragged = any(len({len(sample[key]) for sample in samples if key in sample}) > 1 for key in texts)
    values = {**_PADS, **dict.fromkeys(texts, inputs.pad_token if is_ragged else 0)}
    batch = pad(samples, values, "left" if is_left else "right")
    if is_left and "position_ids" not in batch:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch
