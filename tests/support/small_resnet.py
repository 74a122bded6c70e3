"""A small ResNet with BatchNorm, two experts trained apart, and their images: a merge that its statistics decide."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

from adamerge.data import Task, UnlabeledTasks

TASKS = ("dark", "bright")
CLASSES = 4
_PROTOTYPES = torch.randn(2, CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SmallResNet(nn.Module):
    """Images (B, 3, 8, 8) to features (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut), BasicBlock(16, 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).mean((2, 3))


def images_of(task: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images and labels: a pattern for each class, in noise."""
    number = TASKS.index(task)
    generator = torch.Generator().manual_seed(2 * seed + number)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = _PROTOTYPES[number][labels] + 1.2 * torch.randn(count, 3, 8, 8, generator=generator)
    return images * (1, 1.5)[number] + (0, 0.5)[number], labels


def data(batch_size: int = 32, **options: object) -> UnlabeledTasks:
    """Unlabeled streams and images to score."""
    tasks = {
        task: Task(
            adapt=TensorDataset(*images_of(task, 320, 1001)), evaluate=TensorDataset(*images_of(task, 400, 1002))
        )
        for task in TASKS
    }
    return UnlabeledTasks(tasks, batch_size=batch_size, **options)


class SmallBackbone:
    """A backbone of the user's own; heads are in the experts' files."""

    prefix = ""
    exclude = ("fc.*",)

    def encoder(self) -> nn.Module:
        return SmallResNet()

    def preprocess(self):
        return torch.as_tensor

    def heads(self, base, experts, tasks):
        heads = {task: nn.Linear(16, CLASSES) for task in tasks}
        for task, head in heads.items():
            head.load_state_dict({key: experts[task].get(f"fc.{key}") for key in ("weight", "bias")})
        return heads

    def sidecar(self):
        return None


def trained() -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of a base and the two experts, each with its classifier ``fc``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, heads = SmallResNet(), {task: nn.Linear(16, CLASSES) for task in TASKS}
        _train(base, heads["dark"], "dark", 25, 3e-3)
        experts = {}
        for task in TASKS:
            experts[task] = copy.deepcopy(base)
            _train(experts[task], heads[task], task, 80, 1e-2)
    models = {"base": (base, heads["dark"]), **{task: (experts[task], heads[task]) for task in TASKS}}
    return {
        name: {**model.state_dict(), **{f"fc.{key}": tensor.detach() for key, tensor in head.state_dict().items()}}
        for name, (model, head) in models.items()
    }


def save(models: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, Path]:
    """Write them as files."""
    paths = {name: folder / f"{name}.safetensors" for name in models}
    for name, tensors in models.items():
        save_file(tensors, paths[name])
    return paths


def _train(model: nn.Module, head: nn.Module, task: str, steps: int, lr: float) -> None:
    model.train()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr)
    for step in range(steps):
        images, labels = images_of(task, 48, step)
        functional.cross_entropy(head(model(images)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
