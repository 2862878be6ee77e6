"""Judging a frozen encoder: probes, neighbours, collapse monitors, and intervals over seeds."""

from metacal.evaluate.encode import features as features
from metacal.evaluate.intervals import Interval as Interval
from metacal.evaluate.intervals import mean_interval as mean_interval
from metacal.evaluate.intervals import paired_interval as paired_interval
from metacal.evaluate.knn import knn as knn
from metacal.evaluate.monitors import dimension_std as dimension_std
from metacal.evaluate.monitors import is_collapsed as is_collapsed
from metacal.evaluate.monitors import rank_me as rank_me
from metacal.evaluate.monitors import uniformity as uniformity
from metacal.evaluate.probe import ProbeResult as ProbeResult
from metacal.evaluate.probe import linear_probe as linear_probe
from metacal.evaluate.transfer import Scores as Scores
from metacal.evaluate.transfer import transfer as transfer
