"""Write the merged checkpoint when adaptation has ended."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from adamerge.errors import InputError
from adamerge.methods.method import MergingMethod, data_of
from adamerge.model.batch_norm import BatchNormPolicy, with_statistics
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.results.export import export
from adamerge.results.recipes import method_facts
from adamerge.system.files import ensure_writable
from adamerge.system.progress import Stopwatch


class ExportMergedWeights(Callback):
    """Export merged weights, coefficients, heads and recipe at the end of ``fit``.

    Nothing is written when the fit was interrupted: resume it, or export its checkpoint on request.

    Args:
        dirpath: The folder, checked for writing before training starts.
        filename: Name of the merged checkpoint.
        head_info: JSON-ready facts about the heads by task, such as class names.
        sidecar: Content of ``open_clip_config.json``, to load the export in plain open_clip.
        recipe: Further content of ``merge.json``, such as the resolved configuration.
        batch_norm: Which statistics the encoder's BatchNorm layers are exported with; None for the base's. To
            recalibrate them, the trainer's datamodule must be :class:`~adamerge.data.UnlabeledTasks`.

    Attributes:
        files: Short name to file, once exported.
        seconds: That the export took.
    """

    def __init__(
        self,
        dirpath: Path | str,
        filename: str = "merged.safetensors",
        *,
        head_info: Mapping[str, Any] | None = None,
        sidecar: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        batch_norm: BatchNormPolicy | None = None,
    ) -> None:
        if not filename.endswith(".safetensors"):
            raise InputError(
                f"ExportMergedWeights.filename: expected a name ending in .safetensors, found {filename!r}."
            )
        self.dirpath = Path(dirpath)
        self.filename = filename
        self.head_info = head_info
        self.sidecar = sidecar
        self.recipe = dict(recipe or {})
        self.batch_norm = batch_norm or BatchNormPolicy("base")
        self.files: dict[str, Path] = {}
        self.seconds = 0.0

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before training where the result could not be written."""
        ensure_writable(self.dirpath)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files; also where a resumed run had no step left, which skips ``on_train_end``."""
        watch = Stopwatch()
        data = data_of(trainer)
        if data is not None:
            data.gather_unreadable()
        model = pl_module.model
        assert isinstance(model, MergedModel)
        statistics = {}
        runs = trainer.is_global_zero or model.is_sharded  # whose passes all processes run together
        if runs and self.batch_norm.applies(model):
            with torch.no_grad():
                statistics = self.batch_norm.final(model, model.merge(), data)
        self._export(trainer, pl_module, model, statistics)
        self.seconds = watch.seconds()

    @rank_zero_only
    def _export(
        self, trainer: Trainer, pl_module: LightningModule, model: MergedModel, statistics: Mapping[str, Tensor]
    ) -> None:
        recipe = {"steps": trainer.global_step, **self.recipe}
        data = data_of(trainer)
        if data is not None:
            recipe |= {"protocol": data.protocol, "seed": data.seed, "unreadable": data.unreadable()}
        if isinstance(pl_module, MergingMethod):
            recipe |= {"skipped_steps": pl_module.skipped, **pl_module.export_recipe()}
            if "config" not in recipe:  # a run from Python
                recipe |= method_facts(pl_module, pl_module.objective, next(iter(trainer.optimizers), None))
            recipe |= {"evidence": pl_module.evidence} if pl_module.evidence else {}
        if statistics:
            recipe["batch_norm"] = dataclasses.asdict(self.batch_norm)
        merged = pl_module.exported() if isinstance(pl_module, MergingMethod) else model.coefficients
        facts = None
        if not isinstance(merged, Coefficients):
            merged = dict(with_statistics(merged.items(), model.pool, statistics))
            facts = {"method": type(pl_module).__name__, "steps": trainer.global_step, "seed": recipe.get("seed")}
        self.files = export(
            model.pool,
            merged,
            self.dirpath,
            filename=self.filename,
            statistics=statistics,
            facts=facts,
            heads=model.heads,
            head_info=self.head_info,
            sidecar=self.sidecar,
            recipe=recipe,
        )
