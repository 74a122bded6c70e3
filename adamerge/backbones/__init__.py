"""What differs between architectures, as data: encoder, key prefix, preprocessing, heads.

One class per library of models, none per model family. A backbone of your own is any class with the
members of :class:`Backbone`, chosen by import path (``backbone._target_=my_package.MyBackbone``).
"""

from adamerge.backbones.open_clip import OpenClip as OpenClip
from adamerge.backbones.open_clip import ZeroShotHead as ZeroShotHead
from adamerge.backbones.protocol import Backbone as Backbone
from adamerge.backbones.protocol import check_classes as check_classes
from adamerge.backbones.protocol import own_base as own_base
from adamerge.backbones.torchvision import Torchvision as Torchvision
