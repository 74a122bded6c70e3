"""Zoos: the demo's, which ships (7 MB), that of the offline benchmark, and one of text encoders."""

from adamerge.zoo.build import build
from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages, tasks
from adamerge.zoo.model import benchmark_folder, create_model, files
from adamerge.zoo.text import text_zoo_folder
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
    "text_zoo_folder",
]
