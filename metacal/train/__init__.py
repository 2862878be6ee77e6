"""Long runs: a loop that may be killed and resumed, its checkpoints, logs, environment and report."""

from metacal.train import checkpoint as checkpoint
from metacal.train import report as report
from metacal.train.checkpoint import Checkpoint as Checkpoint
from metacal.train.checkpoint import CheckpointError as CheckpointError
from metacal.train.environment import resolve_device as resolve_device
from metacal.train.environment import seed_everything as seed_everything
from metacal.train.environment import write_environment as write_environment
from metacal.train.logs import Logs as Logs
from metacal.train.logs import read_metrics as read_metrics
from metacal.train.loop import NonFiniteError as NonFiniteError
from metacal.train.loop import fit as fit
