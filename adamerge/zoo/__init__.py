"""The demo zoo: a small CLIP, six experts fine-tuned from it, and their images. Offline, real, 7 MB."""

from adamerge.zoo.build import build
from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages
from adamerge.zoo.model import create_model, files
from adamerge.zoo.tasks import tasks
from adamerge.zoo.tokenizer import Tokenizer

__all__ = [
    "CLASSES",
    "TASKS",
    "TEMPLATES",
    "Tokenizer",
    "ZooImages",
    "build",
    "create_model",
    "files",
    "tasks",
]
