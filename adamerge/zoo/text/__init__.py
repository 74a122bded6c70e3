"""Zoos of real weights and real labelled texts, both from inside packages: sentence encoders and language models."""

from adamerge.zoo.text.build import TextDesign, packages_folder
from adamerge.zoo.text.language_models import build_llm, llm_design, llm_zoo_folder
from adamerge.zoo.text.sentences import build_text, text_design, text_zoo_folder
from adamerge.zoo.text.tasks import DEFAULT, QUESTIONS, QUESTIONS_DEFAULT, TASKS, TextTask
from adamerge.zoo.text.texts import text_tasks

__all__ = [
    "DEFAULT",
    "QUESTIONS",
    "QUESTIONS_DEFAULT",
    "TASKS",
    "TextDesign",
    "TextTask",
    "build_llm",
    "build_text",
    "llm_design",
    "llm_zoo_folder",
    "packages_folder",
    "text_design",
    "text_tasks",
    "text_zoo_folder",
]
