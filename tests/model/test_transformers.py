"""Small networks of transformers' own classes: a padded batch has the gradients of its samples one by one."""

from functools import partial

import pytest
import torch

from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.data.batch import pad
from adamerge.objectives.alignment import Alignment
from adamerge.objectives.imitation import Imitation
from tests.support.gradients import gradient, one_by_one
from tests.support.toy import perturbed

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LONGEST = 9


def llama():
    config = transformers.LlamaConfig(**SMALL, use_cache=False, tie_word_embeddings=False, pad_token_id=0)
    return transformers.LlamaForCausalLM(config), "model.layers.*"


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config), "transformer.h.*"


def bert():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config), "bert.encoder.layer.*"


def t5():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), "*coder.block.*"


def ids(prefix: str = "") -> dict[str, torch.Tensor]:
    length = int(torch.randint(2, LONGEST + 1, ()))
    tokens = torch.randint(1, 32, (length,))
    return {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": torch.ones(length, dtype=torch.long)}


def shifted(inputs):
    mask = inputs["attention_mask"].bool()
    return mask[:, 1:] & mask[:, :-1]


def with_positions(samples, side):
    """What a backbone's collate does for networks that take positions."""
    batch = pad(samples, side=side)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def merged(network, valid, dtype=torch.float32):
    base = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    states = [{name: value.to(dtype) for name, value in state.items()} for state in (base, perturbed(base, 0.05))]
    pool = ExpertPool.from_state_dicts(states[0], {"one": states[1]})
    return MergedModel(network.to(dtype), pool, Coefficients(pool, "layer"), {}, valid=valid)


CASES = {
    "llama, right": (llama, shifted, partial(with_positions, side="right")),
    "llama, left": (llama, shifted, partial(with_positions, side="left")),
    "gpt2, left": (gpt2, shifted, partial(with_positions, side="left")),
    "gpt2, right without positions": (gpt2, shifted, pad),
    "bert": (bert, None, pad),
    "t5": (t5, lambda inputs: inputs["decoder_attention_mask"].bool(), pad),
}


# What float32 leaves, of the gradient's norm: both sides are as far from float64 as from each other, up to 5e-7.
PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("case", CASES)
def test_padded_batch_has_the_gradients_of_its_samples_one_by_one(case):
    make, valid, collate = CASES[case]
    for dtype, tolerance in PRECISIONS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, layers = make()
            samples = {"one": [{**ids(), **(ids("decoder_") if make is t5 else {})} for _ in range(5)]}
            model = merged(network.eval(), valid, dtype)
        for objective in (Imitation(), Alignment(hidden_layers=(layers,), anchor=0, distance="sum")):
            whole = gradient(model, objective, {"one": collate(samples["one"])}, {"one": 1})
            single = one_by_one(model, objective, samples, collate)
            assert single.norm() > 0
            assert (whole - single).norm() <= tolerance * single.norm()


def test_hidden_layers_by_glob_are_the_blocks():
    for make in (llama, gpt2, bert, t5):
        network, layers = make()
        batch = pad([{**ids(), **(ids("decoder_") if make is t5 else {})} for _ in range(3)])
        outputs = next(iter(merged(network.eval(), None).expert_outputs("one", [("one", batch)], (layers,))))
        assert len(outputs.hidden) == (4 if make is t5 else 2)
        assert {tuple(value.shape[::2]) for value in outputs.hidden.values()} == {(3, 16)}
