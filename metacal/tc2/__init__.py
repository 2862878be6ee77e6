"""TC²: task conflict calibration for self-supervised learning.

A batch is split into several SSL tasks. Their representations are *calibrated* before the SSL objective reads them:
generative factors ``V`` [d, n_f] shared by all tasks, and per sample sparse weights ``w`` over them, give ``z~ = w V^T``.
The calibrator is trained with the encoder by a two-stage bi-level scheme, and thrown away afterwards: downstream users
get the uncalibrated encoder.

Source: "Exploring Transferability of Self-Supervised Learning by Task Conflict Calibration", arXiv 2511.13787. Its full
text and code are not available to us, so the documentation says where each piece comes from:

- **[A]** its abstract says it;
- **[S]** a public summary of it says it: right in structure, not to the last symbol;
- **[O]** our own decision, because the source is silent, or degenerate as it stands.
"""

from __future__ import annotations

from metacal.tc2.calibrate import PCA as PCA
from metacal.tc2.calibrate import Calibrator as Calibrator
from metacal.tc2.calibrate import Identity as Identity
from metacal.tc2.calibrate import Networks as Networks
from metacal.tc2.calibrate import SoftThreshold as SoftThreshold
from metacal.tc2.calibrate import Sparsity as Sparsity
from metacal.tc2.calibrate import TopK as TopK
from metacal.tc2.conflict import Conflict as Conflict
from metacal.tc2.conflict import cosines as cosines
from metacal.tc2.conflict import measure_conflict as measure_conflict
from metacal.tc2.conflict import monitors as monitors
from metacal.tc2.conflict import pcgrad as pcgrad
from metacal.tc2.conflict import transfer_matrix as transfer_matrix
from metacal.tc2.conflict import upgrad as upgrad
from metacal.tc2.factors import VacuousReconstructionWarning as VacuousReconstructionWarning
from metacal.tc2.factors import check_num_factors as check_num_factors
from metacal.tc2.losses import CalibrationLoss as CalibrationLoss
from metacal.tc2.losses import literal as literal
from metacal.tc2.losses import stable as stable
from metacal.tc2.measurement import Measurement as Measurement
from metacal.tc2.measurement import measure as measure
from metacal.tc2.method import Method as Method
from metacal.tc2.method import MethodState as MethodState
from metacal.tc2.method import base as base
from metacal.tc2.method import project_conflicts as project_conflicts
from metacal.tc2.networks import Network as Network
from metacal.tc2.networks import network as network
from metacal.tc2.pairing import all_tasks as all_tasks
from metacal.tc2.pairing import cross as cross
from metacal.tc2.pairing import cyclic as cyclic
from metacal.tc2.pairing import judged as judged
from metacal.tc2.pairing import own as own
from metacal.tc2.pairing import pairing_matrix as pairing_matrix
from metacal.tc2.problem import PerTask as PerTask
from metacal.tc2.problem import Problem as Problem
from metacal.tc2.problem import Views as Views
from metacal.tc2.stages import Stage as Stage
from metacal.tc2.stages import lookahead as lookahead
from metacal.tc2.stages import paper as paper
