"""Checkpoints: written whole or not at all, read without running code."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

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
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        raise UserError(
            f"checkpoints need a folder with room, but {str(path)!r} cannot be written ({error}); "
            "free space or set checkpoint_dir."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    # The rename itself is on the disk only after its folder is.
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
