"""A small network of token ids whose samples have unequal numbers of rows, and runs on it."""

from functools import partial

import torch
from torch import Tensor, nn

from adamerge import Coefficients, ExpertPool, MergedModel, Outputs
from adamerge.data import Task, UnlabeledTasks
from adamerge.data.batch import pad
from adamerge.methods import GradientMerging
from adamerge.model.sharding import ShardedModel
from adamerge.objectives.imitation import Imitation
from adamerge.system import ranks
from tests.support.fits import fit, values
from tests.support.toy import perturbed, save_files

TASKS = ("one", "two")
VOCABULARY = 11


class Sums(nn.Module):
    """Each position (B, S, 6) with the sum of those before it, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + (x * mask).cumsum(1))


class Causal(nn.Module):
    """Token ids (B, S) to logits (B, S, C) of the next token, each from the tokens before; an ``auxiliary`` beside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.layers = nn.ModuleList([Sums() for _ in range(2)])
        self.head = nn.Linear(6, VOCABULARY)
        self.unused = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x, mask = self.embedding(input_ids), attention_mask.unsqueeze(-1)
        for layer in self.layers:
            x = layer(x, mask)
        return {"auxiliary": x.sum((1, 2)), "logits": self.head(x)}


def valid(inputs: dict[str, Tensor]) -> Tensor:
    """The positions that have a next token; of some texts none."""
    mask = inputs["attention_mask"].bool()
    return mask[:, 1:] & mask[:, :-1]


def read(output: dict[str, Tensor], _: object) -> Outputs:
    return Outputs(output["logits"][:, :-1])


def texts(count: int, seed: int, longest: int = 7) -> list[dict[str, Tensor]]:
    """Texts of 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": one, "attention_mask": torch.ones(len(one), dtype=torch.long)} for one in ids]


def make_model(folder=None, dtype: torch.dtype = torch.float64) -> MergedModel:
    """A merged model; in parts on several processes, if ``folder`` is given, where the first writes the files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Causal().to(dtype)
        base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        experts = {task: perturbed(base, 0.4) for task in TASKS}
    if folder is None:
        pool = ExpertPool.from_state_dicts(base, experts)
    else:
        if ranks.is_first():
            save_files(folder, base, experts)
        ranks.wait()
        paths = {name: folder / f"{name}.safetensors" for name in TASKS}
        pool = ExpertPool.from_files(folder / "base.safetensors", paths, mapped=ranks.count() > 1)
    kind = MergedModel if folder is None or ranks.count() == 1 else ShardedModel
    return kind(network, pool, Coefficients(pool, "layer", 0.3), {}, read=read, valid=valid)


def make_data(batch_size: int, count: int = 40, **options) -> UnlabeledTasks:
    tasks = {task: Task(adapt=[(text, 0) for text in texts(count, seed)]) for seed, task in enumerate(TASKS)}
    return UnlabeledTasks(tasks, batch_size=batch_size, collate=pad, **options)


def learned(folder, data: UnlabeledTasks, steps=3, objective=None, model=None, lr=0.5, weights=None, **options):
    """Return the coefficients after some steps of gradient descent, which shows a wrong scale as Adam would not."""
    method = GradientMerging(
        model or make_model(), objective or Imitation(), partial(torch.optim.SGD, lr=lr), task_weights=weights
    )
    fit(method, data, folder, steps, **options)
    return values(method)
