"""``trainer.precision=auto``: mixed precision where the machine computes in it, decided once, where a run begins."""

import logging

import torch
from omegaconf import DictConfig, OmegaConf

from adamerge.model.half_products import has_bfloat16_units
from adamerge.system import ranks

log = logging.getLogger(__name__)


def settled(config: DictConfig) -> DictConfig:
    """Put bf16-mixed, or else 32-true, in the place of ``trainer.precision=auto``; the run keeps it when it is resumed.

    Mixed is a GPU with bfloat16, or a processor with units for it (AVX-512 BF16 or AMX): elsewhere bfloat16 is slower
    than float32.
    """
    if str(OmegaConf.select(config, "trainer.precision")) == "auto":
        accelerator = str(OmegaConf.select(config, "trainer.accelerator"))
        config.trainer.precision, reason = ranks.of_first(_precision_here(accelerator))
        log.info("trainer.precision: auto is %s here: %s.", config.trainer.precision, reason)
    return config


def _precision_here(accelerator: str) -> tuple[str, str]:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes in bfloat16"
        return "32-true", "the GPU has no bfloat16; trainer.precision=16-mixed is faster"
    if accelerator in ("auto", "cpu") and has_bfloat16_units():
        return "bf16-mixed", "the processor has units for bfloat16"
    return "32-true", "no unit for bfloat16"
