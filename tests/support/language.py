"""A tiny language model in a folder, with a tokenizer of whole words."""

from pathlib import Path

WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus", "is", "what", "which",
    "the", "a", "of", "red", "blue", "green", "yes", "no",
]  # fmt: skip


def tokenizer(words=WORDS):
    """Return a tokenizer that divides at spaces, and begins and ends no text with anything of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def llama(folder: Path, seed: int = 0, words=WORDS, **changes) -> Path:
    """Write a Llama of about 10,000 parameters, drawn by ``seed``, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {**sizes, "vocab_size": len(words) + 3, "max_position_embeddings": 64, "pad_token_id": 0, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(bos_token_id=2, eos_token_id=2, initializer_range=0.5, **options))
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder
