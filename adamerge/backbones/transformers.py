"""Any model of the transformers library, by its Auto classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.backbones import networks
from adamerge.backbones.classifiers import read_classifiers
from adamerge.backbones.file_names import FileNames, check_vocabularies, file_names, network_names, path_of
from adamerge.backbones.model_inputs import ModelInputs, collate
from adamerge.backbones.own_heads import HeadModule, find_head, head_of
from adamerge.backbones.protocol import expert_of
from adamerge.backbones.reading import FEATURES, next_tokens, pooled, rows_of
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.composed import tell_once
from adamerge.checkpoints.model_folder import HF_CONFIG
from adamerge.data.batch import Inputs, Outputs
from adamerge.data.task import Task
from adamerge.errors import InputError, check_choice, check_number, shorten
from adamerge.system.reading import read_json_mapping


@dataclass(frozen=True)
class Transformers:
    """A model of transformers, whose network is built without weights: the merge is its weights.

    A head of the experts' own, which their files have and the base lacks or has in another shape, becomes the head of
    their task; in the shared network :class:`torch.nn.Identity` stands in its place.

    Args:
        auto: An Auto class by name, such as ``AutoModelForCausalLM``; None for the class that ``config.json`` names.
        model: The folder with the model's configuration and tokenizer; default the pool's base.
        pool: ``base`` and ``experts`` as a pool names them, whose tensor names are related to the network's.
        head: Path of the module that is each expert's own; ``auto`` for the rule above, None for no such head.
        features: What stands for an output without logits: ``pooler_output``, ``image_embeds``, ``text_embeds``,
            ``last_hidden_state``, ``mean`` (of its valid positions) or ``first`` (position); ``auto`` for the first
            of the first four that there is.
        normalize: Whether these have norm 1, as those of sentence encoders.
        classifiers: A file with frozen classifiers on these, ``TASK.weight`` (C, F) and ``TASK.bias`` (C,).
        vocabulary: ``refuse`` experts with further tokens; or ``shared``: the rows of shared tokens merge, further ones
            come from the one expert that has them.
        positions: Which positions of a causal model count: ``all``, or those of the ``answer`` only; of a text without
            an answer, the last.
        max_length: Most tokens of a text; default what tokenizer and model take.
        long_texts: What becomes of texts with more: ``truncate`` or ``refuse``.
        truncation_side: Which end is cut off, ``right`` or ``left``; None for the tokenizer's own.

    Raises:
        InputError: If the folder has no model, the class does not fit it, or an option has another value.
    """

    auto: str | None = None
    model: str | Path | None = None
    pool: Mapping[str, Any] | None = None
    head: str | None = "auto"
    features: str = "auto"
    normalize: bool = False
    classifiers: str | Path | None = None
    vocabulary: Literal["refuse", "shared"] = "refuse"
    positions: Literal["all", "answer"] = "all"
    max_length: int | None = None
    long_texts: Literal["truncate", "refuse"] = "truncate"
    truncation_side: Literal["right", "left"] | None = None
    prefix: str = field(default="", init=False)

    def __post_init__(self) -> None:
        check_choice("backbone.features", self.features, FEATURES)
        check_choice("backbone.vocabulary", self.vocabulary, ("refuse", "shared"))
        check_choice("backbone.positions", self.positions, ("all", "answer"))
        check_choice("backbone.long_texts", self.long_texts, ("truncate", "refuse"))
        check_choice("backbone.truncation_side", self.truncation_side, ("right", "left", None))
        if self.max_length is not None:
            check_number("backbone.max_length", self.max_length, 1, whole=True)
        self.network_class  # noqa: B018  # refused here, before any weight is read

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's configuration."""
        place = self.model or (self.pool or {}).get("base")
        if not place:
            raise InputError("backbone.model: expected the folder of a model that transformers wrote, found none.")
        path = path_of(place)
        return path.parent if path.is_file() else path

    @cached_property
    def config(self) -> Any:
        """The model's configuration, as the network is built from it."""
        return networks.read_config(self.folder)

    @cached_property
    def network_class(self) -> type[Any]:
        """The network's class in transformers."""
        return networks.class_of(self.config, self.auto, self.folder)

    @property
    def is_rearranged(self) -> bool:
        """Whether the base's file has the names of the network, where those of the library's files are others."""
        return networks.rearranges(self._plain) and all(key == name for key, name in self._base.names.items())

    @property
    def class_name(self) -> str:
        """The name of the network's class."""
        return self.network_class.__name__

    @cached_property
    def _network(self) -> nn.Module:
        """The network with as many tokens as the largest vocabulary."""
        network = self._plain
        if self.vocabulary == "refuse":
            return network
        names = networks.vocabulary_names(network)
        shapes = [file.shapes for file in (self._base, *self._experts.values())]
        rows = max((shape[name][0] for shape in shapes for name in names if name in shape), default=0)
        text = self.config.get_text_config()
        if rows <= text.vocab_size:
            return network
        text.vocab_size = rows
        return networks.new_network(self.network_class, self.config)

    @cached_property
    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """The names of the network's parameters and buffers, each under all its names, with their shapes."""
        parameters = self._plain.named_parameters(remove_duplicate=False)
        return {name: tuple(tensor.shape) for name, tensor in (*parameters, *self._plain.named_buffers())}

    @cached_property
    def _plain(self) -> nn.Module:
        """The network as the base's configuration has it."""
        networks.check_size(self.network_class, self.config)
        return networks.new_network(self.network_class, self.config)

    @cached_property
    def _base(self) -> FileNames:
        """The tensors of the base's file."""
        return file_names((self.pool or {}).get("base") or self.folder, self._plain, self._parameters)

    @cached_property
    def _experts(self) -> dict[str, FileNames]:
        """The tensors of the experts' files."""
        places = (self.pool or {}).get("experts") or {}
        return {str(name): file_names(place, self._plain, self._parameters) for name, place in places.items()}

    @cached_property
    def head_module(self) -> HeadModule | None:
        """The module that is each expert's own; None where there is none."""
        self._check_same_model()
        if self.head is None:
            return None
        grown, tied = set(self.extended), networks.tied_names(self._plain)
        if not grown:
            check_vocabularies(networks.vocabulary_names(self._plain)[:1], self._base, self._experts)
        path = None if self.head == "auto" else self.head
        experts = {name: file.shapes for name, file in self._experts.items()}
        of_file = self._base.shapes
        base = {alias: of_file[name] for alias, name in tied.items() if name in of_file} | dict(of_file)
        return find_head(self._plain, path, base, experts, grown)

    def _check_same_model(self) -> None:
        """Refuse experts of another model than the base's, by the configurations beside them."""
        places = {"base": (self.pool or {}).get("base"), **((self.pool or {}).get("experts") or {})}
        paths = {name: path_of(place) for name, place in places.items() if place}
        files = {name: (path.parent if path.is_file() else path) / HF_CONFIG for name, path in paths.items()}
        networks.check_same_model({name: read_json_mapping(f) for name, f in files.items() if f.is_file()})

    @property
    def names(self) -> Mapping[str, str]:
        """What the keys of the pool's files are in the network; others are no part of it."""
        names = dict(self._base.names)
        head = self.head_module
        if head is not None:
            # Heads stay under their files' own names, which are the network's where the base lacks them.
            of_base = set(names.values())
            names |= {name: name for name in head.names if name not in of_base}
        return names

    @property
    def tied(self) -> Mapping[str, str]:
        """Alias to the name that merges, where the base's file has both."""
        present = set(self.names.values())
        tied = networks.tied_names(self._network)
        return {alias: name for alias, name in tied.items() if alias in present and name in present}

    @property
    def exclude(self) -> tuple[str, ...]:
        """The experts' own heads, and buffers."""
        head = self.head_module
        return (*(() if head is None else head.names), *(name for name, _ in self._network.named_buffers()))

    @property
    def extended(self) -> tuple[str, ...]:
        """Parameters of which one expert may have further rows."""
        return tuple(networks.vocabulary_names(self._network)) if self.vocabulary == "shared" else ()

    def encoder(self) -> nn.Module:
        """Return the network, without the experts' own head."""
        self.config.use_cache = False
        network = networks.new_network(self.network_class, self.config)
        return network if self.head_module is None else self.head_module.without(network)

    def base_problems(self, base: Checkpoint) -> list[str]:
        """Say which parameters of the network a base lacks."""
        head = self.head_module
        left_out = set() if head is None else set(head.names)
        tied = networks.tied_names(self._network)

        def aliases(name: str) -> list[str]:
            return [alias for alias, canonical in tied.items() if canonical == name]

        missing = [
            name
            for name, _ in self._network.named_parameters()
            if name not in left_out and self._base.shapes.keys().isdisjoint({name, *aliases(name)})
        ]
        if not missing:
            return []
        named = self.config.architectures
        return [
            f"{base.name}: lacks {len(missing)} parameters of {self.class_name}: {shorten(missing)}; it has "
            f"{shorten(self._base.others) or 'no others'}. Is backbone.auto right ({HF_CONFIG} names "
            f"{shorten(named or ['none'])})? Where the library puts tensors together at loading, write the pool as it "
            "has them: adamerge pool pack NAME --through transformers --out FOLDER."
        ]

    def problems(self, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
        """List files that do not fit together, and say which module is each expert's own."""
        head = self.head_module
        if head is not None:
            tell_once(
                f"backbone.head: {head.path}: each expert's own, as {head.reason}; it is the head of its task, and no "
                "part of the merge."
            )
        return self._untied(checkpoints)

    def _untied(self, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
        """List files that hold two values of weights that the network ties."""
        keys = {name: key for key, name in self.names.items()}
        problems = []
        for checkpoint in checkpoints.values():
            present = set(checkpoint.keys)
            for alias, canonical in self.tied.items():
                pair = keys[alias], keys[canonical]
                if present.issuperset(pair) and not torch.equal(*map(checkpoint.get, pair)):
                    problems.append(
                        f"{checkpoint.name}: {pair[0]!r} and {pair[1]!r} differ, but {self.class_name} ties them. "
                        "Were they trained apart? Set tie_word_embeddings to false in the base's config.json."
                    )
        return problems

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Split each expert's own head off its file; none where the network's own outputs count.

        Raises:
            InputError: If a task has no expert, or the expert's file has no such head.
        """
        head = self.head_module
        for problem in self.problems({"base": base, **experts}):
            raise InputError(problem)
        if self.classifiers is not None:
            return read_classifiers(self.classifiers, tasks)
        if head is None:
            return {}
        heads: dict[str, nn.Module] = {}
        for name, task in tasks.items():
            heads[name] = self._head(head, expert_of(name, task, experts, head.path))
        return heads

    def _head(self, head: HeadModule, expert: Checkpoint) -> nn.Module:
        renamed = network_names(self._plain, expert.keys, self._parameters)
        keys = {name: key for key, name in renamed.items() if name in head.names}
        of_base = {name: key for key, name in self._base.names.items() if name in head.names}
        keys = {**{name: key for name, key in of_base.items() if key in set(expert.keys)}, **keys}
        tensors = {name: expert.get(key) for name, key in keys.items()}
        return head_of(head, tensors, expert.name, partial(networks.new_network, self.network_class), self.config)

    def preprocess(self) -> Callable[[Any], Mapping[str, Tensor]]:
        """Return the way from a text or image to an input: tokenizer, image processor or processor of the folder."""
        return self._inputs

    @property
    def _tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: the expert's that has further tokens, else the model's own."""
        for name in self.extended[:1]:
            for expert, file in self._experts.items():
                if file.shapes.get(name, (0,))[0] > self._base.shapes.get(name, (0,))[0]:
                    path = path_of((self.pool or {})["experts"][expert])
                    return path.parent if path.is_file() else path
        return self.folder

    @cached_property
    def _inputs(self) -> ModelInputs:
        return ModelInputs(
            self._tokenizer_folder,
            is_causal=self._rows == "next",
            is_encoder_decoder=self._rows == "decoder",
            decoder_start=getattr(self.config, "decoder_start_token_id", None),
            argument=str(self.network_class.main_input_name),
            max_length=networks.most_tokens(self._plain, self.config, self.max_length),
            truncates=self.long_texts == "truncate",
            truncation_side=self.truncation_side,
        )

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return one batch; texts of other lengths are padded on the tokenizer's side, where that is exact."""
        has_positions = self._rows == "next" and networks.takes(self._network, "position_ids")
        return collate(samples, self._inputs, has_positions=has_positions)

    @cached_property
    def _rows(self) -> str:
        return rows_of(self.class_name, is_encoder_decoder=self.config.is_encoder_decoder, features=self.features)

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return the rows of the logits that count: of texts the tokens that are no padding, or their predictions."""
        if not isinstance(inputs, Mapping):
            return None
        if self._rows == "next" and "input_ids" in inputs:
            return next_tokens(inputs, answers_only=self.positions == "answer")
        mask = inputs.get({"decoder": "decoder_attention_mask", "tokens": "attention_mask"}.get(self._rows, ""))
        return None if mask is None else mask.bool()

    def read(self, output: Any, inputs: Inputs) -> Outputs:
        """Return a network's result: logits, or what a head takes, with the class axis last.

        Raises:
            InputError: If there are neither logits nor what ``features`` names.
        """
        logits = getattr(output, "logits", None)
        if logits is None:
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            follows_body = self.head_module is not None and self.head_module.body is not None
            logits = pooled(output, mask, "first" if follows_body else self.features, self.class_name)
            logits = functional.normalize(logits, dim=-1) if self.normalize else logits
        if not isinstance(logits, Tensor):
            raise InputError(
                f"backbone: {self.class_name} gives {type(logits).__name__} as logits, expected a tensor. Choose "
                "another Auto class, or a backbone of your own with a method read()."
            )
        logits = logits.movedim(1, -1) if logits.ndim == 4 else logits
        return Outputs(logits, logits)

    def sidecar(self) -> None:
        """The export is no open_clip model."""
