"""Several merges side by side: one row each."""
