"""A zoo of text encoders: the weights of all-MiniLM-L6-v2 and real labelled texts, both from inside packages."""

from adamerge.zoo.text.build import build_text, packages_folder, text_design, text_zoo_folder
from adamerge.zoo.text.tasks import DEFAULT, TASKS, TextTask
from adamerge.zoo.text.texts import text_tasks

__all__ = [
    "DEFAULT",
    "TASKS",
    "TextTask",
    "build_text",
    "packages_folder",
    "text_design",
    "text_tasks",
    "text_zoo_folder",
]
