"""From a configuration to a run: compose, check, start, run."""
