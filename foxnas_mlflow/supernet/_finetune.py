"""Training one subnet alone: what its weights lose by being shared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from foxnas_mlflow.core.errors import InvalidInputError, TrainingError
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.supernet._batches import Batches
from foxnas_mlflow.supernet._network import PlainNetwork
from foxnas_mlflow.supernet._optimizer import set_velocities, sgd, velocities

_MOMENTUM, _WEIGHT_DECAY, _SMOOTHING, _CLIP = 0.9, 3e-5, 0.1, 2.0


def finetune(
    plain: PlainNetwork,
    batches: Batches,
    *,
    epochs: int,
    learning_rate: float,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
    device: str = "cpu",
) -> PlainNetwork:
    """Go on training a network from the weights that it has, with those of no other network in between.

    SGD as in the training of the supernet, its learning rate falling to zero by a cosine.

    Args:
        plain: The network, which is changed.
        batches: Training batches of its image size.
        epochs: Passes over the training images.
        learning_rate: The first, largest learning rate.
        progress: Called with steps done, all steps and the loss.
        checkpoint: A file of this training alone, which is written as it goes and, where it is there
            already, gone on from.
        checkpoint_seconds: Seconds between two writes of it.
        device: Where to compute.

    Returns:
        The network, in evaluation mode on the processor.

    Raises:
        InvalidInputError: If epochs is not positive.
        TrainingError: If the loss is not finite.
    """
    if epochs < 1:
        raise InvalidInputError("epochs must be positive", received=epochs)
    plain = plain.to(device).train()
    optimizer = sgd(plain, learning_rate=learning_rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    n_steps, saved = epochs * len(batches), time.monotonic()
    step = 0 if checkpoint is None else _read(checkpoint, plain, optimizer)
    for epoch in range(step // len(batches), epochs):
        for images, targets in batches.epoch(epoch, start=step % len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(plain(images.to(device)), targets.to(device), label_smoothing=_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(plain.parameters(), _CLIP)
            optimizer.step()
            step += 1
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError("the loss must stay finite", received=value, remedy="take fewer epochs")
            if progress is not None:
                progress(step, n_steps, value)
            if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                _write(checkpoint, plain, optimizer, step)
                saved = time.monotonic()
    return plain.to("cpu").eval()


def _write(path: Path, plain: PlainNetwork, optimizer: torch.optim.SGD, step: int) -> None:
    tensors = {f"model.{name}": t for name, t in plain.state_dict().items()}
    tensors |= {f"velocity.{name}": t for name, t in velocities(plain, optimizer).items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(contiguous, metadata={"step": str(step)}))


def _read(path: Path, plain: PlainNetwork, optimizer: torch.optim.SGD) -> int:
    """Go to where a checkpoint is; the steps done, 0 where there is none that is whole."""
    if not path.is_file():
        return 0
    try:
        with safe_open(str(path), framework="pt") as file:
            step = int((file.metadata() or {})["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, KeyError, ValueError, OSError):
        return 0
    weights, saved = (
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        for prefix in ("model.", "velocity.")
    )
    plain.load_state_dict(weights)
    set_velocities(plain, optimizer, saved)
    return step
