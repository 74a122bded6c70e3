"""Zoos: the demo's, which ships (7 MB), the offline benchmark's, and those of text encoders and language models."""

from adamerge.zoo.build import build
from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages, tasks
from adamerge.zoo.model import benchmark_folder, create_model, files
from adamerge.zoo.text import llm_zoo_folder, text_zoo_folder
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
    "llm_zoo_folder",
    "tasks",
    "text_zoo_folder",
]
