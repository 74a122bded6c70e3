"""open_clip's tokenizer, cut down to the words of the demo zoo's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(_vocabulary()[1])

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
        tokenizer, ids = _vocabulary()
        return torch.searchsorted(torch.tensor(ids), tokenizer(texts, context_length=CONTEXT_LENGTH))

    def _check(self, text: str) -> None:
        tokenizer, ids = _vocabulary()
        tokens = tokenizer.encode(text)
        unknown = [tokenizer.decode([token]).strip() for token in tokens if token not in ids]
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


@cache  # a process builds many backbones, and the words take half a second to read
def _vocabulary() -> tuple[Any, tuple[int, ...]]:
    """Return open_clip's tokenizer and the ids of the zoo's words in order."""
    from open_clip.tokenizer import SimpleTokenizer  # imports slowly, and a check of a run needs no token

    tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    names = sorted({name for classes in CLASSES.values() for name in classes})
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    words = {token for prompt in prompts for token in tokenizer.encode(prompt)}
    return tokenizer, tuple(sorted({0, *tokenizer.all_special_ids} | words))
