"""Initial weights: random, ImageNet (torchvision's), or from a file."""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn

from skin_resnet.errors import UserError
from skin_resnet.model.resnet import STAGE_DEPTHS

# V2 comes from a longer training with a heavier recipe; what transfers better depends on the data.
_IMAGENET = {"imagenet": "IMAGENET1K_V2", "imagenet_v1": "IMAGENET1K_V1"}
_HEAD_KEYS = ("fc.weight", "fc.bias")


def load_weights(network: nn.Module, weights: str, arch: str) -> str:
    """Load initial weights into a network of `build_resnet(arch, ...)`; return in words what it starts from.

    `weights` is `none`, `imagenet` (torchvision's IMAGENET1K_V2), `imagenet_v1`, or the path of a state dict
    (`.pth`, `.pt`, `.safetensors`). A head of another size stays random. Blocks that a shallower ResNet lacks
    stay as they are built, the identity. Every other key must match in name and shape.

    Raises:
        UserError: The weights cannot be downloaded or read, or do not fit.
    """
    if weights == "none":
        return "random weights"
    is_file = weights not in _IMAGENET
    name = weights if is_file else f"torchvision's {_IMAGENET[weights]}"
    state = _read_state_dict(Path(weights).expanduser()) if is_file else _download_imagenet(arch, weights)
    expected = network.state_dict()
    fresh = [key for key in _HEAD_KEYS if key not in state or state[key].shape != expected[key].shape]
    state = {key: value for key, value in state.items() if key not in fresh}
    for key, value in state.items():
        # Quantized weights are integers, and useless without their scales.
        if key in expected and value.is_floating_point() != expected[key].is_floating_point():
            raise UserError(f"weights={weights}: {key!r} is {value.dtype}; save the weights dequantized")
        if not value.float().isfinite().all():
            raise UserError(f"weights={weights}: {key!r} has NaN or infinite values; the training diverged")
    try:
        missing, unknown = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a line for each shape that differs, below a heading
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"weights={weights} do not fit {arch}: {reason}") from None
    # Files written before PyTorch 0.4.1 lack these counters, which nothing here reads.
    missing = [key for key in missing if key not in fresh and not key.endswith("num_batches_tracked")]
    extra = _find_extra_blocks(state, missing)
    missing = [key for key in missing if _name_block(key) not in extra]
    if missing or unknown:
        raise UserError(
            f"weights={weights} do not fit {arch}: {len(missing)} keys are missing and {len(unknown)} "
            f"unknown, such as {[*missing, *unknown][0]!r}"
        )
    blocks = f"; {len(extra)} more blocks start as the identity" if extra else ""
    if not fresh:
        return f"weights from {name}, head included{blocks}"
    return f"weights from {name}; random head ({expected['fc.bias'].numel()} classes){blocks}"


def _find_extra_blocks(state: dict[str, Tensor], missing: list[str]) -> set[str]:
    """Return the blocks that the network has, and a state dict of a whole, shallower ResNet does not."""
    held = {_name_block(key) for key in state}
    depths = tuple(sum(name.startswith(f"layer{stage}.") for name in held) for stage in range(1, 5))
    if depths not in STAGE_DEPTHS.values():
        return set()
    return {_name_block(key) for key in missing if key.startswith("layer")} - held


def _name_block(key: str) -> str:
    return ".".join(key.split(".")[:2])  # layer3.5 of layer3.5.conv1.weight


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in its file.

    It may be under `network`, `model` or `state_dict`. A `module.` prefix (of DataParallel) is removed.
    """
    if not path.is_file():
        raise UserError(f"weights={path}: there is no file of this name")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # here: a logged model reads its checkpoint without this package

            content: Any = safetensors.torch.load_file(path)
        else:
            content = read_torch_file(path)
        for key in ("network", "model", "state_dict"):  # the first is ours
            content = content[key] if isinstance(content.get(key), dict) else content
        return {key.removeprefix("module."): value.detach() for key, value in content.items()}
    except OSError as error:
        raise UserError(f"cannot read weights={path}: {error.strerror or error}") from None
    except Exception:  # a broken file, or one with something else, can raise any
        raise UserError(
            f"weights={path} is damaged, or holds more than the tensors of a state dict; save "
            "network.state_dict()"
        ) from None


def read_torch_file(path: Path) -> Any:
    """Read tensors and plain values that `torch.save` wrote, onto the CPU, without running code in the file.

    Raises:
        pickle.UnpicklingError: The file holds other objects, none of which has been loaded.
        Exception: It is damaged: whatever torch's reader fails with, RuntimeError, EOFError, IndexError, ...
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch writes checksums, unless told not to, and ignores them: a flipped bit is a wrong weight.
            if any(member.CRC for member in archive.infolist()) and (damaged := archive.testzip()):
                raise RuntimeError(f"{damaged} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols: an error or nothing follows
        return torch.load(path, map_location="cpu", weights_only=True)


def _download_imagenet(arch: str, weights: str) -> dict[str, Tensor]:
    published = torchvision.models.get_model_weights(arch)[_IMAGENET[weights]]
    try:
        return dict(published.get_state_dict(progress=os.isatty(2), check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"weights={weights}: cannot download torchvision's {arch} ({error}); pass weights=FILE with a "
            "state dict, or weights=none"
        ) from None
