"""Task vectors before they are merged: one parameter's stack in, the same shape out.

A transform is any object that is called with a parameter's name and its task vectors, (E, *S), and returns as many;
it is chosen by import path (``transform._target_=my_package.MyTransform``). One that needs statistics of the whole
model, or the experts' names, has ``prepare(source)`` instead, which returns that function. Coefficients are learned
on the result; teachers stay the raw experts.
"""

from adamerge.transforms.awd import Awd as Awd
from adamerge.transforms.chain import Chain as Chain
from adamerge.transforms.dare import Dare as Dare
from adamerge.transforms.depth import Lines as Lines
from adamerge.transforms.magnitude import Breadcrumbs as Breadcrumbs
from adamerge.transforms.magnitude import Magnitude as Magnitude
from adamerge.transforms.magnitude import Trim as Trim
from adamerge.transforms.masks import Consensus as Consensus
from adamerge.transforms.masks import Tall as Tall
from adamerge.transforms.norms import EqualNorms as EqualNorms
from adamerge.transforms.pcb import Pcb as Pcb
from adamerge.transforms.protocol import Prepared as Prepared
from adamerge.transforms.protocol import Source as Source
from adamerge.transforms.protocol import Transform as Transform
from adamerge.transforms.protocol import apply as apply
from adamerge.transforms.protocol import check_transform as check_transform
from adamerge.transforms.random_directions import RandomDirections as RandomDirections
from adamerge.transforms.ties import Ties as Ties
from adamerge.transforms.tsv import Tsv as Tsv
