"""open_clip's tokenizer, cut down to the words of the demo zoo's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.zoo.images import CLASSES, TEMPLATES

CONTEXT_LENGTH = 16


class Tokenizer:
    """Turn prompts into token ids of the demo zoo's small vocabulary.

    The ids are those of open_clip's ``SimpleTokenizer``, renumbered in order. Padding stays 0 and the end-of-text
    token stays the largest id, where open_clip's text tower looks for it.

    Attributes:
        context_length: Tokens per text, padding included.

    Example:
        >>> tokens = Tokenizer()(["a picture of the digit two."])
        >>> tokens.shape
        torch.Size([1, 16])
    """

    context_length = CONTEXT_LENGTH

    @cached_property
    def _tokenizer(self) -> Any:
        from open_clip.tokenizer import SimpleTokenizer  # imports slowly, and a check of a run needs no token

        return SimpleTokenizer(context_length=CONTEXT_LENGTH)

    @cached_property
    def _ids(self) -> Tensor:
        names = sorted({name for classes in CLASSES.values() for name in classes})
        prompts = [template.format(name) for name in names for template in TEMPLATES]
        special = {0, *self._tokenizer.all_special_ids}
        words = {token for prompt in prompts for token in self._tokenizer.encode(prompt)}
        return torch.tensor(sorted(special | words))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._ids)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenize one text or several.

        Args:
            texts: Texts built from the words of ``CLASSES`` and ``TEMPLATES``.

        Returns:
            Token ids, shape ``(N, 16)``, int64.

        Raises:
            InputError: If a text holds a word outside the vocabulary, or too many tokens.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            self._check(text)
        return torch.searchsorted(self._ids, self._tokenizer(texts, context_length=CONTEXT_LENGTH))

    def _check(self, text: str) -> None:
        tokens = self._tokenizer.encode(text)
        ids = set(self._ids.tolist())
        unknown = [self._tokenizer.decode([token]).strip() for token in tokens if token not in ids]
        if unknown:
            raise InputError(
                f"Text {text!r} does not fit the demo zoo's vocabulary: unknown {', '.join(map(repr, unknown))}. "
                "Its text tower knows only the words of adamerge.zoo.CLASSES and adamerge.zoo.TEMPLATES."
            )
        if len(tokens) + 2 > CONTEXT_LENGTH:  # start and end of text
            raise InputError(
                f"Text {text!r} is too long for the demo zoo's text tower: expected at most {CONTEXT_LENGTH - 2} "
                f"tokens, got {len(tokens)}. Shorten the template."
            )
