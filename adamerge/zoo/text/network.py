"""A sentence encoder of the library transformers: texts to normalised mean-pooled features, and zero-shot heads.

Shapes: B texts in a batch, L ids of its longest text, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.errors import InputError

SCALE = 20.0
"""Of the cosines of a text and a class sentence, to logits: that of the encoder's own training."""


def library() -> Any:
    """Return the library transformers.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f'The text zoo needs transformers ({error}): pip install "adamerge[hf]"') from error
    return transformers


class SentenceEncoder:
    """A network and its tokenizer.

    Args:
        folder: Folder that ``transformers`` reads.
        max_length: Ids that a text is cut to.

    Raises:
        InputError: If the library is not installed.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        transformers = library()
        transformers.utils.logging.disable_progress_bar()  # of reading a hundred tensors
        options = {"local_files_only": True, "trust_remote_code": False}
        self.network: nn.Module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **options)
        self._max_length = max_length

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, cut and not padded."""
        return [
            list(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self._max_length).input_ids
        ]

    def features(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the features (B, F) of one batch, of norm 1."""
        batch = self._tokenizer.pad({"input_ids": [list(row) for row in ids]}, return_tensors="pt")
        hidden = self.network(**batch).last_hidden_state  # (B, L, F)
        mask = batch["attention_mask"][..., None].to(hidden)  # (B, L, 1)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def all_features(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Return the features (N, F) of many texts, those of similar length in one batch."""
        ids, training = self.ids(texts), self.network.training
        self.network.eval()
        order = sorted(range(len(ids)), key=lambda position: len(ids[position]))
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        features = torch.cat([self.features([ids[position] for position in part]) for part in parts])
        self.network.train(training)
        return features[torch.tensor(order).argsort()]


def zero_shot_head(encoder: SentenceEncoder, sentences: Sequence[str]) -> nn.Linear:
    """Return a frozen head (F to C) whose rows are the features of class sentences, times :data:`SCALE`."""
    weight = SCALE * encoder.all_features(sentences)
    head: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False)
    head.load_state_dict({"weight": weight})
    return head.requires_grad_(False)
