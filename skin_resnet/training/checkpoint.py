"""Checkpoints: written whole or not at all, read without running code."""

import contextlib
import glob
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skin_resnet.data.folders import hold_lock, is_held
from skin_resnet.errors import UserError
from skin_resnet.model.torch_file import read_torch_file

FORMAT = 1  # raised when what is in a checkpoint changes its meaning


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; a process killed meanwhile leaves the old file whole.

    Raises:
        UserError: The disk is full or the folder cannot be written; the old checkpoint is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with temporary.open("wb") as file, hold_lock(temporary):
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch tells a full disk as a RuntimeError about positions; what else it tells is no matter of disks.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"checkpoints need a folder with room, but {str(path)!r} cannot be written "
            f"({cause.strerror or cause}); free space or set checkpoint_dir."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def hash_network(network: dict[str, Tensor]) -> str:
    """Name a network's weights: equal if and only if each bit of each is."""
    digest = hashlib.sha256()
    for name in sorted(network):
        digest.update(name.encode() + network[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of this checkpoint: a file as large as itself for each."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if not is_held(leftover):
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    # The rename itself is on the disk only after its folder is. Not every file system can: the file is whole.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        UserError: There is no such file, or it is not one of our checkpoints.
    """
    if not path.is_file():
        raise UserError(f"a checkpoint must be a file, but there is no {str(path)!r}.")
    try:
        content = read_torch_file(path)
    except Exception:  # a broken file can raise any
        raise UserError(
            f"a checkpoint must be written by this project, but {str(path)!r} is broken or something else."
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"a checkpoint must have format {FORMAT}, but {str(path)!r} has {found}.")
    return content
