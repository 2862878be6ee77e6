"""Self-supervised objectives: pure functions of the representations of m views of n samples.

All of them are safe under ``torch.func.vmap``, ``grad`` and ``jvp(grad)``, have finite first and second derivatives at
zero vectors and at entries that do not vary, and take any number of views m >= 2: the mean over pairs of views of the
published two-view loss.
"""

from metacal.objectives._base import Outputs as Outputs
from metacal.objectives._base import SSLObjective as SSLObjective
from metacal.objectives._ema import ema as ema
from metacal.objectives.barlow_twins import BarlowTwins as BarlowTwins
from metacal.objectives.byol import BYOL as BYOL
from metacal.objectives.simclr import SimCLR as SimCLR
from metacal.objectives.simsiam import SimSiam as SimSiam
from metacal.objectives.vicreg import VICReg as VICReg
