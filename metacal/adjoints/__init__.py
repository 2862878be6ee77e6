"""Ways to differentiate the run of an inner problem."""

from metacal.adjoints.base import Adjoint as Adjoint
from metacal.adjoints.base import Cotangents as Cotangents
from metacal.adjoints.first_order import FirstOrder as FirstOrder
from metacal.adjoints.implicit import Implicit as Implicit
from metacal.adjoints.unrolled import Unrolled as Unrolled
