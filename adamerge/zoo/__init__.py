"""Zoos made offline from real images: the demo's, which ships (7 MB), and the larger one of the offline benchmark."""

from adamerge.zoo.build import build
from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages, tasks
from adamerge.zoo.model import benchmark_folder, create_model, files
from adamerge.zoo.tokenizer import Tokenizer

__all__ = [
    "CLASSES",
    "TASKS",
    "TEMPLATES",
    "Tokenizer",
    "ZooImages",
    "benchmark_folder",
    "build",
    "create_model",
    "files",
    "tasks",
]
