"""How the encoder runs must not show in its results: recomputed, compiled, channels-last, in half precision."""

import pytest
import torch
from torch import nn

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.model.encoder import EncoderOptions, Runner
from tests.support.toy import make_toy, perturbed, run_engine, run_step, squares

HIDDEN = ("blocks.*", "blocks.0.up", "stem")


def loss_of(step) -> torch.Tensor:
    """A loss that uses the logits and every hidden layer."""
    return step.outputs.logits.square().mean() + sum(h.square().mean() for h in step.outputs.hidden.values())


def gradient(toy, options: EncoderOptions | None = None, **how) -> torch.Tensor:
    pool = toy.pool()
    model = MergedModel(toy.encoder, pool, Coefficients(pool, "row"), toy.heads, options=options)
    return run_step(model, loss_of, toy, **how).gradient


@pytest.mark.parametrize("pattern", ["unused"])
def test_hidden_layer_without_a_tensor_of_its_own_is_refused(pattern):
    encoder = nn.Sequential(nn.Linear(2, 2))
    encoder.blocks = nn.ModuleList([nn.Linear(2, 2)])
    encoder.unused = nn.Linear(2, 2)
    encoder.forward = lambda inputs: encoder.blocks[0](encoder[0](inputs))
    runner = Runner(encoder, EncoderOptions())
    with pytest.raises(InputError, match=r"hidden_layers: '(blocks|unused)' gives no tensor .*such as its members"):
        runner(encoder, torch.ones(1, 2), (pattern,))
    assert set(runner(encoder, torch.ones(1, 2), ("blocks.*",))[1]) == {"blocks.0"}


class Convolutions(nn.Module):
    """Two stages of convolutions with batch normalisation, as in a ResNet; remembers the layout of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layer1 = nn.Sequential(self._stage(6, 8), self._stage(8, 8))
        self.seen: list[bool] = []

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images):
        self.seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return self.layer1(self.stem(images)).mean((2, 3))


def convolutions() -> tuple[Convolutions, ExpertPool, dict[str, torch.Tensor]]:
    encoder = Convolutions().double()
    base = {name: tensor.detach().clone() for name, tensor in encoder.named_parameters()}
    pool = ExpertPool.from_state_dicts(base, {task: perturbed(base) for task in "ab"})
    return encoder, pool, {task: torch.randn(3, 3, 9, 9).double() for task in "ab"}


def convolutions_gradient(encoder, pool, inputs, **options) -> torch.Tensor:
    coefficients = Coefficients(pool, "row")
    heads = {task: nn.Linear(8, 4).double() for task in "ab"}
    torch.manual_seed(5)
    for head in heads.values():
        nn.init.normal_(head.weight)
        nn.init.zeros_(head.bias)
    model = MergedModel(encoder, pool, coefficients, heads, options=EncoderOptions(**options))
    return run_engine(model, inputs, squares).gradient


# Recomputed activations


@pytest.mark.parametrize("checkpoint", [True, ["blocks.*"], ["blocks.1", "stem"]], ids=str)
@pytest.mark.parametrize("micro_batch", ["auto", 4])
@pytest.mark.parametrize("hidden_layers", [(), HIDDEN], ids=["outputs", "hidden"])
def test_checkpoint_gives_the_same_gradient(checkpoint, micro_batch, hidden_layers):
    toy = make_toy(torch.float64)
    how = {"micro_batch": micro_batch, "hidden_layers": hidden_layers}
    result = gradient(toy, EncoderOptions(checkpoint=checkpoint), **how)
    torch.testing.assert_close(result, gradient(toy, **how), rtol=1e-12, atol=1e-14)


def test_checkpoint_under_bfloat16_gives_the_same_bits():
    toy = make_toy()
    results = []
    for options in (None, EncoderOptions(checkpoint=True)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradient(toy, options, hidden_layers=HIDDEN))
    assert torch.equal(*results)
    assert not torch.equal(results[0], gradient(toy, hidden_layers=HIDDEN))  # autocast was on


def test_checkpoint_keeps_fewer_activations_and_leaves_the_encoder_alone():
    toy = make_toy()
    kept = {}
    for checkpoint in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            gradient(toy, EncoderOptions(checkpoint=checkpoint))
        kept[checkpoint] = sum(sizes)
    assert kept[True] < kept[False]
    assert not any("forward" in vars(module) or module._forward_hooks for module in toy.encoder.modules())


def test_checkpoint_of_a_block_recomputes_it_once():
    toy = make_toy()
    calls = []
    toy.encoder.blocks[0].up.register_forward_pre_hook(lambda *_: calls.append(1))
    gradient(toy)
    assert len(calls) == 1
    gradient(toy, EncoderOptions(checkpoint=["blocks.0", "blocks.0.up"]))  # nested: the outer one counts
    assert len(calls) == 3


def test_checkpoint_true_finds_the_blocks_of_a_vit_and_the_stages_of_a_resnet():
    from torchvision.models import resnet18, vit_b_32

    from adamerge.model.encoder import Runner

    with torch.device("meta"):
        vit, resnet = vit_b_32(), resnet18()
    found = list(Runner(vit, EncoderOptions(checkpoint=True))._recomputed)
    assert [name for name in found if "layers" in name] == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    found = list(Runner(resnet, EncoderOptions(checkpoint=True))._recomputed)
    assert found == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


# Compiled


def compiled_frames() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("hidden_layers", "checkpoint"),
    [
        pytest.param((), False, marks=pytest.mark.slow, id="kept"),
        pytest.param(HIDDEN, False, marks=pytest.mark.slow, id="kept-hidden"),
        pytest.param((), True, marks=pytest.mark.slow, id="recomputed"),
        pytest.param(("blocks.[01]", "stem"), True, id="recomputed-hidden"),
    ],
)
def test_compile_gives_the_same_gradient(hidden_layers, checkpoint):
    toy = make_toy(torch.float64)
    options = EncoderOptions(compile="aot_eager", checkpoint=checkpoint)
    result = gradient(toy, options, hidden_layers=hidden_layers)
    torch.testing.assert_close(result, gradient(toy, hidden_layers=hidden_layers), rtol=1e-12, atol=1e-14)


def test_compile_hidden_layer_inside_a_recomputed_module_is_refused(toy):
    with pytest.raises(
        InputError, match=r"the hidden layer 'blocks\.0\.up' lies inside a recomputed module.*one of the"
    ):
        gradient(toy, EncoderOptions(compile="aot_eager", checkpoint=True), hidden_layers=("blocks.0.up",))


@pytest.mark.slow
def test_compile_makes_two_graphs_for_all_steps_and_batches_and_one_more_for_hidden_layers():
    toys = [make_toy(torch.float64, batch=batch) for batch in (2, 3, 5, 4, 7)]
    toy = toys[0]
    pool = toy.pool()
    models = [
        MergedModel(toy.encoder, pool, Coefficients(pool, "row"), toy.heads, options=options)
        for options in (None, EncoderOptions(compile="aot_eager"))
    ]
    torch._dynamo.reset()  # it remembers from other tests which sizes vary
    before = compiled_frames()
    made = []
    for point, other in enumerate(toys):
        results = []
        for model in models:
            with torch.no_grad():
                model.coefficients.raw.fill_(0.2 + 0.1 * point)  # other weights, too, need no other code
            results.append(run_step(model, loss_of, other, micro_batch=point + 1).gradient)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
        made.append(compiled_frames() - before)
    assert made == [1, 2, 2, 2, 2]  # one for the first size, one for every size
    for hidden in (("blocks.0",), (), ("blocks.0",), ()):
        results = [run_step(model, loss_of, toy, hidden_layers=hidden).gradient for model in models]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert compiled_frames() - before == 3


@pytest.mark.slow
def test_compile_with_inductor_agrees_to_rounding():
    toy = make_toy()
    result = gradient(toy, EncoderOptions(compile=True), hidden_layers=HIDDEN)
    torch.testing.assert_close(result, gradient(toy, hidden_layers=HIDDEN), rtol=1e-4, atol=1e-6)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"encoder\.compile: .* no-such-compiler is not installed.*compile=false"):
        EncoderOptions(compile=True)


# Channels last


@pytest.mark.parametrize("checkpoint", [False, True])
def test_channels_last_gives_the_same_gradient(checkpoint):
    encoder, pool, inputs = convolutions()
    plain = convolutions_gradient(encoder, pool, inputs)
    assert encoder.seen == [False]
    result = convolutions_gradient(encoder, pool, inputs, channels_last=True, checkpoint=checkpoint)
    assert encoder.seen == [False, True]
    torch.testing.assert_close(result, plain, rtol=1e-11, atol=1e-13)


def test_channels_last_leaves_other_inputs_alone():
    encoder, pool = nn.Linear(4, 3), None
    base = {name: tensor.detach().clone() for name, tensor in encoder.named_parameters()}
    pool = ExpertPool.from_state_dicts(base, {"a": perturbed(base)})
    model = MergedModel(encoder, pool, Coefficients(pool), {}, options=EncoderOptions(channels_last=True))
    assert model(torch.randn(2, 4)).shape == (2, 3)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "blocks.*"}, r"encoder\.checkpoint: expected a list .* found 'blocks\.\*'"),
        ({"checkpoint": [3]}, r"encoder\.checkpoint: expected a list"),
        ({"checkpoint": 3}, r"encoder\.checkpoint: expected a list"),
        ({"channels_last": "yes"}, r"encoder\.channels_last: .* found 'yes'"),
        ({"compile": "inductr"}, r"encoder\.compile: .* found 'inductr'\. Did you mean 'inductor'\?"),
        ({"compile": 1.5}, r"encoder\.compile: expected true, false or a backend"),
    ],
)
def test_encoder_options_bad_value_is_named(options, message):
    with pytest.raises(InputError, match=message):
        EncoderOptions(**options)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (["blokcs.0"], r"encoder\.checkpoint: 'blokcs\.0' matches no module of the encoder\. Did you mean 'blocks\.0'"),
        (True, r"Linear has no Sequential or ModuleList whose members"),
    ],
)
def test_checkpoint_that_selects_nothing_is_refused(toy, checkpoint, message):
    encoder = nn.Linear(4, 3) if checkpoint is True else toy.encoder
    base = {name: tensor.detach().clone() for name, tensor in encoder.named_parameters()}
    pool = ExpertPool.from_state_dicts(base, {"a": perturbed(base)})
    with pytest.raises(InputError, match=message):
        MergedModel(encoder, pool, Coefficients(pool), {}, options=EncoderOptions(checkpoint=checkpoint))
