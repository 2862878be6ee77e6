"""Differentiable optimizers of torchopt's type, with torch.optim's names, defaults and numbers.

Every float hyperparameter is a number, a 0-dim tensor (a leaf to differentiate, a tracer of ``torch.func``) or a schedule.
"""

from metacal.optim import schedules as schedules
from metacal.optim.adaptive import adadelta as adadelta
from metacal.optim.adaptive import adagrad as adagrad
from metacal.optim.adaptive import rmsprop as rmsprop
from metacal.optim.factored import adafactor as adafactor
from metacal.optim.foreign import OptimizerLike as OptimizerLike
from metacal.optim.foreign import moves_at_zero_gradient as moves_at_zero_gradient
from metacal.optim.foreign import probe as probe
from metacal.optim.foreign import resolve as resolve
from metacal.optim.labels import by_label as by_label
from metacal.optim.layerwise import lamb as lamb
from metacal.optim.layerwise import lars as lars
from metacal.optim.moments import adam as adam
from metacal.optim.moments import adamax as adamax
from metacal.optim.moments import adamw as adamw
from metacal.optim.moments import nadam as nadam
from metacal.optim.moments import radam as radam
from metacal.optim.momentum import asgd as asgd
from metacal.optim.momentum import sgd as sgd
from metacal.optim.neural import MLP as MLP
from metacal.optim.neural import GradientFeatures as GradientFeatures
from metacal.optim.neural import learned as learned
from metacal.optim.orthogonal import muon as muon
from metacal.optim.signs import lion as lion
from metacal.optim.signs import rprop as rprop
from metacal.optim.transformation import DifferentiableTransformation as DifferentiableTransformation
from metacal.optim.transformation import GradientTransformation as GradientTransformation
from metacal.optim.transformation import Hyperparameter as Hyperparameter
from metacal.optim.transformation import apply_updates as apply_updates
from metacal.optim.transformation import chain as chain
from metacal.optim.transformation import moved as moved
from metacal.optim.transforms import add_decayed_weights as add_decayed_weights
from metacal.optim.transforms import clip_by_global_norm as clip_by_global_norm
from metacal.optim.transforms import clip_by_value as clip_by_value
from metacal.optim.transforms import meta_sgd as meta_sgd
from metacal.optim.transforms import scale as scale
