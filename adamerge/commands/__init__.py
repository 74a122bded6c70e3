"""The commands of ``adamerge``, by what they work on; :mod:`adamerge.cli` puts them together."""
