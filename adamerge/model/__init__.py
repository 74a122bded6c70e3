"""Coefficients, merge and functional call: the only trainable thing, and its mathematics."""
