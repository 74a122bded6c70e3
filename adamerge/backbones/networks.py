"""Networks of the transformers library, built from a configuration without weights."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adamerge.backbones.forecast import bounded, forecast
from adamerge.checkpoints.model_folder import HF_CONFIG
from adamerge.errors import InputError, check_number, did_you_mean
from adamerge.system.reading import read_json_mapping

_MAX_PARTS = 100_000  # parameters, buffers and modules: the largest mixtures of experts have 50,000
_MAX_COUNT = 1_000_000  # of layers, labels and the like: the library lists them before it builds any
_MAX_SIZE = 1 << 27  # of widths, vocabularies and positions
_SIZES = re.compile("vocab|size|dim|position|length|theta|window|token|max|seed|_id$")  # keys of the latter
_SHAPING = (  # options that change the shapes of what is merged, by the library's usual names
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    *("intermediate_size", "d_ff", "hidden_dim", "num_attention_heads", "num_key_value_heads", "patch_size"),
)
_PLAIN = (
    "The code that a folder brings is never run. If a class of transformers computes the same, remove auto_map from "
    "config.json and name that class's model_type; else register the class in a package of your own, and give a "
    "backbone of your own: backbone._target_=my_package.MyBackbone."
)


def read_config(folder: Path) -> Any:
    """Read the configuration in a model's folder.

    Raises:
        InputError: If there is none, transformers does not know it, or it needs code of the folder's.
    """
    from transformers import AutoConfig

    file = folder / HF_CONFIG
    if not file.is_file():
        raise InputError(
            f"backbone.model: {folder}: expected the folder of a model that transformers wrote, with {HF_CONFIG}; "
            "found none. Name it: backbone.model=FOLDER."
        )
    content = read_json_mapping(file)
    check_numbers(content, file)
    if quantization := content.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"{file}: quantization_config: the weights are quantised ({method}); a base needs plain ones. Name the "
            "model that was quantised, or write dequantised weights: model.dequantize() of transformers, then "
            "save_pretrained(); of GGUF: adamerge convert FILE.gguf --out FOLDER."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the library makes of a file that is not its own
        if content.get("auto_map"):
            raise InputError(
                f"{file}: auto_map: the model computes by code that lies beside it, and transformers has no class for "
                f"model_type {content.get('model_type')!r}. {_PLAIN}"
            ) from error
        raise InputError(f"{file}: transformers cannot read it: {' '.join(str(error).split())}") from error


def check_numbers(content: Mapping[str, Any], file: Path) -> None:
    """Refuse numbers that the library would make lists or tables of, and a name of another configuration.

    Raises:
        InputError: If there are such.
    """
    if "configuration_files" in content:
        raise InputError(f"{file}: configuration_files: another file is not read in its place. Remove the key.")
    pending: list[tuple[str, Any]] = list(content.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, int):
            check_number(f"{file}: {key}", value + 0, high=_MAX_SIZE if _SIZES.search(key) else _MAX_COUNT)


def _is_network(found: Any) -> bool:
    """Whether a name of transformers is a network's, and not one of its functions or other classes."""
    from transformers import PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def class_of(config: Any, auto: str | None, folder: Path) -> type[Any]:
    """Return the class of the network.

    Args:
        config: The model's configuration.
        auto: An Auto class by name; None for the class that the configuration names.
        folder: The model's, for messages.

    Raises:
        InputError: If there is no such class, or none of its models has this configuration.
    """
    import transformers

    if auto is None:
        names = [name for name in config.architectures or () if _is_network(getattr(transformers, str(name), None))]
        if not names:
            raise InputError(
                f"{folder / HF_CONFIG}: architectures: names no class of transformers. Name an Auto class: "
                f"backbone.auto={next(iter(_fitting(config)), 'AutoModel')}."
            )
        network: type[Any] = getattr(transformers, names[0])
        return network
    known = auto_classes()
    if auto not in known:
        raise InputError(
            f"backbone.auto: expected an Auto class of transformers, such as AutoModelForCausalLM, found {auto!r}."
            f"{did_you_mean(auto, known)}"
        )
    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        raise InputError(
            f"backbone.auto: {auto} has no model of model_type {config.model_type!r} ({folder / HF_CONFIG}). Fitting "
            f"are: {', '.join(_fitting(config)) or 'none'}."
        )
    classes = mapping[type(config)]
    chosen: type[Any] = classes[0] if isinstance(classes, tuple) else classes
    return chosen


def auto_classes() -> list[str]:
    """Return the names of the Auto classes of models."""
    import transformers

    return [name for name in dir(transformers) if name.startswith("AutoModel")]


def _fitting(config: Any) -> list[str]:
    import transformers

    classes = {name: getattr(transformers, name) for name in auto_classes()}
    return [name for name, kind in classes.items() if type(config) in getattr(kind, "_model_mapping", ())]


def check_size(kind: type[Any], config: Any) -> None:
    """Refuse a network of too many parts, or one whose buffers would not fit, before it is built; see `new_network`.

    Raises:
        InputError: If it is too large.
    """
    try:
        with forecast(f"backbone.model: {kind.__name__}", _MAX_PARTS, weights=False), _without_weights():
            kind(type(config).from_dict(config.to_dict()))
    except InputError:
        raise
    except Exception:  # of the few networks that compute with values while they are built: `new_network` tells more
        return


def new_network(kind: type[Any], config: Any) -> nn.Module:
    """Return a network whose parameters take no memory; its buffers have their values, and tied weights are tied.

    Args:
        kind: A class of transformers.
        config: The configuration; not changed.

    Raises:
        InputError: If the network cannot be built from it.
    """
    try:
        with bounded(f"backbone.model: {kind.__name__}", _MAX_PARTS), _without_weights():
            network: nn.Module = kind(type(config).from_dict(config.to_dict()))
            network.tie_weights()  # type: ignore[operator]  # every model of the library has it
    except ImportError as error:
        raise InputError(f"backbone.model: {kind.__name__}: {' '.join(str(error).split())}") from error
    except InputError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"backbone.model: {kind.__name__} cannot be built from its configuration: {reason}") from error
    return network.eval().requires_grad_(True)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Register parameters without memory while a network is built, and initialise none.

    Building all of it on the meta device would lose the values of buffers, such as those of rotary embeddings.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined,no-redef]
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # one that is tied keeps its identity
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        with no_init_weights(), torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def library_names(network: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return what the library calls the tensors of a file when it loads them, as far as it only renames them.

    Tensors that it puts together, such as the experts of a mixture, keep their names.

    Args:
        network: Of the library.
        keys: The file's.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 renames nothing
        return {key: key for key in keys}
    transforms = get_model_conversion_mapping(network)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = network.base_model_prefix, network.state_dict()
    names = {key: rename_source_key(key, renamings, converters, prefix, state) for key in keys}
    return {
        key: key if pattern or (key in state and name not in state) else name for key, (name, pattern) in names.items()
    }


def rearranges(network: Any) -> bool:
    """Return whether the library has other tensors in memory than in the files of this network."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return False
    return bool(get_model_conversion_mapping(network, add_legacy=False))


def tied_names(network: nn.Module) -> dict[str, str]:
    """Return alias to canonical name, of the parameters that the library shares."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    every = network.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in every if names[parameter] != name}


def vocabulary_names(network: Any) -> list[str]:
    """Return the parameters with one row per token, the input's first; none of networks that read no tokens."""
    if network.main_input_name != "input_ids":
        return []
    modules = [network.get_input_embeddings(), network.get_output_embeddings()]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    return list(dict.fromkeys(names[id(parameter)] for parameter in parameters))


def most_tokens(network: nn.Module, config: Any, wanted: int | None) -> int | None:
    """Return how many tokens a text may have; None for any number.

    Args:
        network: Whose tables of positions say what it can take.
        config: Its configuration.
        wanted: As the user has it; None for what the configuration says.

    Raises:
        InputError: If the network has learned fewer positions.
    """
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = (name for name, module in network.named_modules() if isinstance(module, nn.Embedding))
    is_learned = any(re.search(r"(^|\.)(wpe|\w*position\w*)$", name) for name in tables)
    if wanted is not None and positions is not None and wanted > positions and is_learned:
        raise InputError(
            f"backbone.max_length: {wanted}, but {type(network).__name__} has learned {positions} positions. Set at "
            f"most {positions}."
        )
    return positions if wanted is None else wanted


def takes(network: nn.Module, argument: str) -> bool:
    """Return whether a network's forward pass has an argument."""
    import inspect

    return argument in inspect.signature(network.forward).parameters


def check_same_model(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse experts whose configurations are of another model than the base's, or of another size.

    Args:
        configs: The content of ``config.json`` by name, ``base`` among them.

    Raises:
        InputError: If one is.
    """
    base = configs.get("base", {})
    for name, config in configs.items():
        for key in ("model_type", *_SHAPING):
            if key in base and key in config and base[key] != config[key]:
                raise InputError(
                    f"Expert {name!r}: {key} {config[key]!r}, but the base has {base[key]!r}. Only experts that were "
                    "fine-tuned from the base can be merged; leave it out, or name its own base."
                )
