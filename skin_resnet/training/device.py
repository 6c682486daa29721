"""What a training runs on: devices and precision, and what to do when memory is full."""

import logging

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.training import ignore_foreign_ranks


def build_fabric(device: str, precision: str, devices: int) -> Fabric:
    """Choose device (`auto`, `cpu`, `cuda`, `mps`) and precision (`auto`, `fp32`, `bf16`).

    With several devices, `fabric.launch()` starts a process for each further one. Devices that this machine
    does not have are a UserError.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    accelerator = next(name for name in has if has[name]) if device == "auto" else device
    if not has[accelerator]:
        raise UserError(f"device={device} is not available on this machine; use device=auto or device=cpu")
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    bf16 = precision == "bf16" or (precision == "auto" and _is_bf16_fast(accelerator))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it uses is printed elsewhere
    torch.backends.cudnn.benchmark = accelerator == "cuda"
    ignore_foreign_ranks()
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="bf16-mixed" if bf16 else "32-true",
        plugins=[LightningEnvironment()],  # not what a scheduler's variables make Lightning choose
    )


def _is_bf16_fast(accelerator: str) -> bool:
    """Return whether bf16 is faster than fp32: a CPU without units for it takes nine times as long."""
    if accelerator == "cpu":
        units = torch.cpu.get_capabilities()
        return bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return accelerator == "cuda" and torch.cuda.is_bf16_supported()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the GPU or the machine is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's and Apple's allocators, and CUDA's first call, raise a plain RuntimeError.
    return any(words in str(error).lower() for words in ("allocate memory", "out of memory"))


def explain_out_of_memory(config: TrainConfig) -> UserError:
    """Build the error that suggests what to try."""
    return UserError(
        f"out of memory at batch_size={config.batch_size}, image_size={config.image_size}; "
        f"try batch_size={max(2, config.batch_size // 2)}"
    )
