"""Training: the step, its checkpoints, and stopping in time."""

from fmxnn.coders.folding import fold_scale
from fmxnn.core.errors import CheckpointError, NonFiniteError
from fmxnn.training.annealing import anneal_k
from fmxnn.training.calibration import Calibration, calibrate
from fmxnn.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fmxnn.training.objective import Objective
from fmxnn.training.overlap import overlapped
from fmxnn.training.passes import Pass
from fmxnn.training.resampling import resample
from fmxnn.training.signals import StopSignals
from fmxnn.training.starts import isometric_
from fmxnn.training.terms import AuxiliaryLoss, Matryoshka
from fmxnn.training.trainer import Trainer

__all__ = [
    "AuxiliaryLoss",
    "Calibration",
    "CheckpointError",
    "Matryoshka",
    "NonFiniteError",
    "Objective",
    "Pass",
    "StopSignals",
    "Trainer",
    "anneal_k",
    "calibrate",
    "fold_scale",
    "isometric_",
    "list_checkpoints",
    "load_checkpoint",
    "overlapped",
    "resample",
    "save_checkpoint",
]
