"""The configurations of ``adamerge adapt``, importable so that Hydra finds them from any directory."""
