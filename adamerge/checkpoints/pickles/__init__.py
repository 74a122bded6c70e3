"""Pickled checkpoints read without unpickling: tensors and inert records out, nothing imported, nothing called."""

from adamerge.checkpoints.pickles.archive import Pickled, open_pickled
from adamerge.checkpoints.pickles.modules import Found, find_tensors

__all__ = ["Found", "Pickled", "find_tensors", "open_pickled"]
