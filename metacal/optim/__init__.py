"""Differentiable optimizers of torchopt's type, with torch.optim's names, defaults and numbers.

Every float hyperparameter is a number, a 0-dim tensor (a leaf to differentiate, a tracer of ``torch.func``) or a schedule.
"""

from metacal.optim.foreign import moves_at_zero_gradient as moves_at_zero_gradient
from metacal.optim.foreign import probe as probe
from metacal.optim.foreign import resolve as resolve
from metacal.optim.rules import adagrad as adagrad
from metacal.optim.rules import adam as adam
from metacal.optim.rules import adamw as adamw
from metacal.optim.rules import clip_by_global_norm as clip_by_global_norm
from metacal.optim.rules import rmsprop as rmsprop
from metacal.optim.rules import sgd as sgd
from metacal.optim.transformation import DifferentiableTransformation as DifferentiableTransformation
from metacal.optim.transformation import GradientTransformation as GradientTransformation
from metacal.optim.transformation import Hyperparameter as Hyperparameter
from metacal.optim.transformation import apply_updates as apply_updates
from metacal.optim.transformation import chain as chain
