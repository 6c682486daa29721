"""What a training runs on: devices and precision, and what to do when memory is full."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from subprocess import Popen

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.training import get_worker_task, ignore_foreign_ranks, start_workers_with


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
    bf16 = precision == "bf16" or (precision == "auto" and is_bf16_fast(accelerator))
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


def is_bf16_fast(accelerator: str) -> bool:
    """Return whether bf16 is faster than fp32: without units for it, a CPU takes nine times as long."""
    if accelerator == "cpu":
        units = torch.cpu.get_capabilities()
        return bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def launch(fabric: Fabric, task: dict[str, str]) -> list[Popen[bytes]]:
    """Start the processes of the further devices, with the training they take part in, and return them."""
    started: list[Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    try:
        with nullcontext() if get_worker_task() else start_workers_with(task):
            fabric.launch()
    except BaseException as error:
        end_processes(fabric, list(started), error)
        raise
    processes = list(started)
    if fabric.device.type == "cpu":
        # Lightning watches the processes in this list: when one has ended, it kills this one within 5 s,
        # whatever it is doing. On a CPU the next batch fails anyway; NCCL would wait for half an hour.
        started.clear()
    return processes


def end_processes(fabric: Fabric, processes: list[Popen[bytes]], error: BaseException) -> str:
    """Kill the processes of the further devices; return which had ended and so caused the error, if any.

    In the middle of a step they would wait for this one until they time out.
    """
    getattr(fabric.strategy.launcher, "procs", []).clear()  # see `launch`
    may_be_lost = isinstance(error, RuntimeError) and not is_out_of_memory(error)
    if processes and may_be_lost:
        time.sleep(1)  # the connection is lost a moment before the process has ended
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    lost = [f"rank {rank} (exit code {code})" for rank, code in enumerate(codes, start=1) if code]
    caused = f"lost the process of {' and '.join(lost)}; what it said, if anything, is above"
    return caused if lost and may_be_lost else ""


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes of a tensor, and of its gradient."""

    @staticmethod
    def forward(context: object, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(context, gradient)


sum_over_ranks: Callable[[Tensor], Tensor] = _SumOverRanks.apply


class _SharedBatchNorm(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` is on GPUs, for CPUs: statistics are those of all processes' images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape, dims = (1, -1, 1, 1), (0, 2, 3)
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            count = sum_over_ranks(values.new_tensor(values.numel() / values.shape[1]))
            mean = sum_over_ranks(values.sum(dims)) / count
            centered = values - mean.view(shape)
            variance = sum_over_ranks(centered.square().sum(dims)) / count
            scale = self.weight * (variance + self.eps).rsqrt()
            result = centered * scale.view(shape) + self.bias.view(shape)
        with torch.no_grad():
            averages, momentum = dict(self.named_buffers()), self.momentum or 0.0
            averages["running_mean"].lerp_(mean, momentum)
            averages["running_var"].lerp_(variance * count / (count - 1), momentum)
            averages["num_batches_tracked"].add_(1)
        output: Tensor = result.type_as(x)
        return output


def share_batchnorm(network: nn.Module, fabric: Fabric) -> nn.Module:
    """Make BatchNorm see the images of all processes, so that a batch has one result however it is shared."""
    if fabric.world_size == 1:
        return network
    if fabric.device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm  # the same attributes
    return network


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
