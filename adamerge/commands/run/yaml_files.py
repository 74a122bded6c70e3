"""Hydra's reading of the user's yaml files, within bounds."""

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.plugins.config_source import ConfigResult

from adamerge.system.reading import read_yaml_text


class BoundedFiles(FileConfigSource):
    """A folder of yaml files, of which none that is large, deep or doubles is parsed."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises:
            InputError: If it is not safe to parse.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        if path.is_file():
            read_yaml_text(path)
        return super().load_config(config_path)


def prepare_hydra() -> None:
    """Let Hydra know its resolvers, and read the folders of ``--config-dir`` and of search paths within bounds."""
    setup_globals()
    Plugins.instance()  # registers Hydra's own reader, which the next line replaces
    SourcesRegistry.instance().types["file"] = BoundedFiles
