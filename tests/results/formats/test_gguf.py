"""GGUF files become folders of transformers: written here by the gguf library, of a tiny Llama."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adamerge.commands.cli import main

WIDTH, HEADS, TOKENS = 64, 2, 259


def ends(code, *arguments):
    """Run a command in this process and check how it ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == code


def llama():
    """Return a Llama of one layer whose matrices have whole blocks of 32 entries a row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=1, num_attention_heads=HEADS,
            num_key_value_heads=1, vocab_size=TOKENS, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip


def interleaved(weight, heads):
    """Order the rows of a query's or key's weight as llama.cpp does, whose rotary pairs are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(0, 2, 1, 3).reshape(weight.shape)


def quantised(weight):
    """Return a matrix as blocks of 8 bits, as the gguf library rounds it."""
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(weight, GGMLQuantizationType.Q8_0)


def write_gguf(path: Path, model, architecture="llama", has_tokenizer=True, lacking=None):
    """Write the model, matrices in 8 bits."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from tokenizers import pre_tokenizers

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    if has_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])
        writer.add_token_types([3, 3, *[1] * 257])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    layer = "model.layers.0."
    names = {
        "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
        f"{layer}input_layernorm": "blk.0.attn_norm", f"{layer}post_attention_layernorm": "blk.0.ffn_norm",
        f"{layer}self_attn.q_proj": "blk.0.attn_q", f"{layer}self_attn.k_proj": "blk.0.attn_k",
        f"{layer}self_attn.v_proj": "blk.0.attn_v", f"{layer}self_attn.o_proj": "blk.0.attn_output",
        f"{layer}mlp.gate_proj": "blk.0.ffn_gate", f"{layer}mlp.up_proj": "blk.0.ffn_up",
        f"{layer}mlp.down_proj": "blk.0.ffn_down",
    }  # fmt: skip
    for ours, theirs in names.items():
        weight = weights[f"{ours}.weight"]
        weight = (
            interleaved(weight, HEADS if "q_proj" in ours else 1) if "q_proj" in ours or "k_proj" in ours else weight
        )
        if ours == lacking:
            continue
        if weight.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", weight)
        else:
            writer.add_tensor(f"{theirs}.weight", quantised(weight), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_convert_gguf_gives_the_quantised_weights_and_a_tokenizer(tmp_path, capsys):
    from gguf import GGMLQuantizationType, quants
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = llama()
    source = write_gguf(tmp_path / "tiny.gguf", model)
    ends(0, "convert", source, "--out", tmp_path / "folder")
    assert "Generated greedily: 'The capital of France is" in capsys.readouterr().out
    written = load_file(tmp_path / "folder" / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        expected = tensor.numpy()
        if tensor.ndim == 2:  # rows in another order are rounded alike
            expected = quants.dequantize(quantised(expected), GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(written[name].numpy(), expected, err_msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert not hasattr(loaded.config, "quantization_config")
    assert tokenizer.decode(tokenizer("a film")["input_ids"], skip_special_tokens=True) == "a film"
    ends(0, "convert", source, "--out", tmp_path / "half", "--dtype", "bfloat16", "--json")
    assert json.loads(capsys.readouterr().out)["generated"]
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    torch.testing.assert_close(half["lm_head.weight"], written["lm_head.weight"].bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: write_gguf(path, llama(), architecture="nonsense"), "nonsense"),
        (lambda path: write_gguf(path, llama(), has_tokenizer=False), "transformers cannot read it"),
        (lambda path: path.write_bytes(write_gguf(path, llama()).read_bytes()[:3000]), "transformers cannot read it"),
        (lambda path: write_gguf(path, llama(), lacking="model.norm"), "holds no values for 'model.norm.weight'"),
        (lambda path: path.write_bytes(b"not one"), "expected a GGUF file"),
    ],
    ids=["unknown architecture", "no tokenizer", "cut off", "a missing tensor", "another file"],
)
def test_convert_refuses_gguf_that_cannot_be_read(tmp_path, capsys, damage, message):
    damage(tmp_path / "x.gguf")
    ends(2, "convert", tmp_path / "x.gguf", "--out", tmp_path / "folder")
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert all("%|" in bar for bar in bars)
    assert not bars or "no values" in message  # the library's bars, as it reads a whole file
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf"}


def test_convert_refuses_a_part_of_a_gguf_and_what_memory_cannot_hold(tmp_path, capsys, monkeypatch):
    part = write_gguf(tmp_path / "x-00001-of-00002.gguf", llama())
    ends(2, "convert", part, "--out", tmp_path / "folder")
    assert "one part of several; join them: llama-gguf-split --merge" in capsys.readouterr().err
    monkeypatch.setattr("adamerge.results.formats.gguf.free_memory", lambda: 1000)
    ends(2, "convert", part.rename(tmp_path / "x.gguf"), "--out", tmp_path / "folder")
    assert "takes 0.0 GB of memory, and 0.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_quantised_base_is_refused_by_its_kind(tmp_path):
    from adamerge.backbones import Transformers
    from adamerge.errors import InputError

    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"config\.json: quantization_config: .* \(gptq\)"):
        Transformers(model=tmp_path)
