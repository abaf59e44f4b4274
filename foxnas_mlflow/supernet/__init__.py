"""The supernet in PyTorch: network, training, evaluation of its subnets (paper section 3.2)."""

from foxnas_mlflow.supernet._batches import AUGMENTED_EPOCHS, Batches
from foxnas_mlflow.supernet._distributed import Worker, join_workers
from foxnas_mlflow.supernet._evaluate import SubnetEvaluator, recalibrate
from foxnas_mlflow.supernet._finetune import finetune, train_alone
from foxnas_mlflow.supernet._init import InitReport, KnownSupernet, load_init
from foxnas_mlflow.supernet._modes import fastest_mode
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet, plain_logits, subnet_weights
from foxnas_mlflow.supernet._presets import PRESETS, Preset, get_preset
from foxnas_mlflow.supernet._simulated import SimulatedNetwork
from foxnas_mlflow.supernet._state import TrainConfig, TrainingState, begun_with, load_checkpoint
from foxnas_mlflow.supernet._step import Teacher
from foxnas_mlflow.supernet._teacher import function_teacher, network_teacher
from foxnas_mlflow.supernet._timing import time_forward
from foxnas_mlflow.supernet._train import train_supernet

__all__ = [
    "AUGMENTED_EPOCHS",
    "PRESETS",
    "Batches",
    "InitReport",
    "KnownSupernet",
    "PlainNetwork",
    "Preset",
    "SimulatedNetwork",
    "SubnetEvaluator",
    "Supernet",
    "Teacher",
    "TrainConfig",
    "TrainingState",
    "Worker",
    "begun_with",
    "fastest_mode",
    "finetune",
    "function_teacher",
    "get_preset",
    "join_workers",
    "load_checkpoint",
    "load_init",
    "network_teacher",
    "plain_logits",
    "recalibrate",
    "subnet_weights",
    "time_forward",
    "train_alone",
    "train_supernet",
]
