"""What differs between architectures, as data: encoder, key prefix, preprocessing, heads.

One class per library of models, none per model family. A backbone of your own is any class with the
members of :class:`Backbone`, chosen by import path (``backbone._target_=my_package.MyBackbone``).
"""

from typing import TYPE_CHECKING

from adamerge.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from adamerge.backbones.open_clip import OpenClip as OpenClip
    from adamerge.backbones.open_clip import ZeroShotHead as ZeroShotHead
    from adamerge.backbones.protocol import Backbone as Backbone
    from adamerge.backbones.protocol import check_classes as check_classes
    from adamerge.backbones.protocol import own_base as own_base
    from adamerge.backbones.torchvision import Torchvision as Torchvision

__all__ = ["Backbone", "OpenClip", "Torchvision", "ZeroShotHead", "check_classes", "own_base"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "OpenClip": "adamerge.backbones.open_clip",
        "ZeroShotHead": "adamerge.backbones.open_clip",
        "Backbone": "adamerge.backbones.protocol",
        "check_classes": "adamerge.backbones.protocol",
        "own_base": "adamerge.backbones.protocol",
        "Torchvision": "adamerge.backbones.torchvision",
    },
)
