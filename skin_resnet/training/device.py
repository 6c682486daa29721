"""Devices, precision and processes: what a training runs on, and how several devices are started."""

import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.training.worker import get_worker_task


class _OwnLaunch(LightningEnvironment):
    """Takes ranks from our own launch only, whatever a scheduler or torchrun has left in the environment."""

    def __init__(self) -> None:
        super().__init__()
        self._is_worker = get_worker_task() is not None
        if not self._is_worker:
            os.environ.pop("MASTER_PORT", None)  # a free port is chosen

    @property
    def creates_processes_externally(self) -> bool:
        return self._is_worker

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"]) if self._is_worker else 0

    def node_rank(self) -> int:
        return 0


def build_fabric(device: str, precision: str, devices: int) -> Fabric:
    """Choose device and precision.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        precision: `auto`, `fp32` or `bf16`.
        devices: How many; each gets a process of its own from `fabric.launch()`.

    Raises:
        UserError: This machine does not have them.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerator = next(name for name in ("cuda", "mps", "cpu") if has[name]) if device == "auto" else device
    if not has[accelerator]:
        raise UserError(f"device={device}: this machine has none; use device=auto or device=cpu")
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    # bf16 on a CPU without units for it is nine times slower than fp32, so there it is never chosen unasked.
    bf16 = precision == "bf16" or (
        precision == "auto" and accelerator == "cuda" and torch.cuda.is_bf16_supported()
    )
    torch.backends.cudnn.benchmark = accelerator == "cuda"
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="bf16-mixed" if bf16 else "32-true",
        plugins=[_OwnLaunch()],
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the GPU or the machine is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's and Apple's allocators, and CUDA's first call, raise a plain RuntimeError.
    return any(words in str(error).lower() for words in ("allocate memory", "out of memory"))


def explain_out_of_memory(config: TrainConfig) -> UserError:
    """Build the error that says what to try."""
    return UserError(
        f"out of memory at batch_size={config.batch_size}, image_size={config.image_size}; "
        f"try batch_size={max(2, config.batch_size // 2)}"
    )
