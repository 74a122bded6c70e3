"""The commands of ``adamerge``, by what they work on; :mod:`adamerge.commands.cli` puts them together."""
