"""Networks of timm and torchvision from Python: features with heads, and a detector with an objective of one's own."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from adamerge import Coefficients, ExpertPool, MergedModel, Outputs, merge
from adamerge.data import Task, UnlabeledTasks
from adamerge.methods import GradientMerging
from adamerge.objectives.imitation import Imitation
from tests.support.fits import QUIET, fit
from tests.support.gradients import gradient, one_by_one
from tests.support.toy import perturbed

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*workers.*|.*resumable.*|.*does not have many.*")]
TASKS = ("streets", "rooms")


def pool_of(network: nn.Module) -> ExpertPool:
    base = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    return ExpertPool.from_state_dicts(base, {task: perturbed(base, 0.1) for task in TASKS})


def learned(model: MergedModel, data: UnlabeledTasks, objective: object, folder) -> tuple[float, float]:
    """The losses before and after some steps."""
    losses: list[float] = []
    method = GradientMerging(model, objective, lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    method.observers.append(lambda step: losses.append(objective(step).item()))
    fit(method, data, folder, 8)
    return sum(losses[:2]), sum(losses[-2:])


def test_a_network_of_timm_with_heads(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    pool, heads = pool_of(network), {task: nn.Linear(16, 3) for task in TASKS}
    model = MergedModel(network, pool, Coefficients(pool, "layer", 0.0), heads)
    images = {task: [(torch.randn(3, 16, 16), 0) for _ in range(8)] for task in TASKS}
    data = UnlabeledTasks({task: Task(adapt=of_task) for task, of_task in images.items()}, batch_size=8)
    before, after = learned(model, data, Imitation(), tmp_path)
    assert after < before
    network.load_state_dict(merge(pool, model.coefficients, detach=True))
    batch = torch.stack([image for image, _ in images["rooms"]])
    torch.testing.assert_close(heads["rooms"](network(batch)), model.logits(batch, "rooms"))


class Detector(RetinaNet):
    """A detector of torchvision whose result is what it says of each anchor, before boxes are chosen."""

    def forward(self, images, sizes):
        cut = [image[:, :height, :width] for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
        batch, _ = self.transform(cut)
        return self.head(list(self.backbone(batch.tensors).values()))


def pad_images(samples):
    """Images (3, H, W) of any size as one batch, and their sizes (B, 2)."""
    height, width = (max(sample.shape[axis] for sample in samples) for axis in (1, 2))
    padded = [functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in samples]
    return {"images": torch.stack(padded), "sizes": torch.tensor([sample.shape[1:] for sample in samples])}


def read_anchors(output, inputs):
    return Outputs(output["cls_logits"], hidden={"boxes": output["bbox_regression"]})


@dataclass(frozen=True)
class AnchorImitation:
    """Each anchor's classes, which do not exclude one another, and its box, as the task's expert gives them."""

    uses_teacher: ClassVar[bool] = True
    hidden_layers: tuple[str, ...] = ()
    boxes: float = 1.0

    def __call__(self, step):
        ours, expert = step.outputs, step.teacher()
        classes = functional.binary_cross_entropy_with_logits(ours.rows(), expert.rows().sigmoid())
        return classes + self.boxes * functional.smooth_l1_loss(ours.hidden["boxes"], expert.hidden["boxes"])


class Layers(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=4, padding=1)

    def forward(self, images):
        return {"0": self.body(images).relu()}


def test_a_detector_of_torchvision_with_an_objective_of_its_own(tmp_path):
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    network = Detector(Layers(), 4, anchor_generator=anchors, _skip_resize=True, fixed_size=(32, 32)).eval()
    pool = pool_of(network)
    model = MergedModel(network, pool, Coefficients(pool, "layer", 0.0), {}, read=read_anchors)
    images = {task: [torch.rand(3, 20 + n, 32 - n) for n in range(6)] for task in TASKS}
    data = UnlabeledTasks(
        {task: Task(adapt=[(image, 0) for image in of_task]) for task, of_task in images.items()},
        batch_size=6, collate=pad_images,
    )  # fmt: skip
    whole = gradient(model, AnchorImitation(), {"rooms": pad_images(images["rooms"])}, {"rooms": 1})
    single = one_by_one(model, AnchorImitation(), {"rooms": images["rooms"]}, pad_images)
    torch.testing.assert_close(whole, single)
    before, after = learned(model, data, AnchorImitation(), tmp_path)
    assert after < before
    detector = RetinaNet(Layers(), 4, anchor_generator=anchors).eval()
    detector.load_state_dict(merge(pool, model.coefficients, detach=True))
    assert {"boxes", "labels", "scores"} <= set(detector(images["rooms"])[0])
