"""What differs between architectures, as data: encoder, key prefix, preprocessing, heads.

One class per library of models, none per model family. A backbone of your own is any class with the
members of :class:`Backbone`, chosen by import path (``backbone._target_=my_package.MyBackbone``).
"""

from adamerge.backbones.open_clip import OpenClip, ZeroShotHead
from adamerge.backbones.protocol import Backbone, check_classes, collate_of, own_base, read_of, valid_of
from adamerge.backbones.torchvision import Torchvision
from adamerge.backbones.transformers import Transformers

__all__ = [
    "Backbone",
    "OpenClip",
    "Torchvision",
    "Transformers",
    "ZeroShotHead",
    "check_classes",
    "collate_of",
    "own_base",
    "read_of",
    "valid_of",
]
