"""Checkpoints, written whole or not at all and read without running code, and the folder of a run."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from skin_resnet.errors import UserError
from skin_resnet.model.weights import read_torch_file

FORMAT = 3  # raised when what is in a checkpoint changes its meaning


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; a process killed meanwhile leaves the old file whole.

    Raises:
        UserError: The disk is full or the folder is not writable; the old checkpoint is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError about positions in the file, caused by an OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write the checkpoint {path} ({cause.strerror or cause}); make room, or set another "
            "checkpoint_dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoints(contents: dict[Path, dict[str, Any]]) -> None:
    """Write checkpoints one after the other."""
    for path, content in contents.items():
        save_checkpoint(path, content)


def copy_to_cpu(content: Any) -> Any:
    """Copy dicts and lists with the tensors in them to the CPU, so that training on does not change them."""
    if isinstance(content, dict):
        return {key: copy_to_cpu(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [copy_to_cpu(value) for value in content]
    return content.to("cpu", copy=True) if isinstance(content, Tensor) else content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; no file, or another one, is a UserError."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = dict(read_torch_file(path))
        found = content["format"]
    except Exception:  # a broken file can raise any
        raise UserError(f"{path} is not a checkpoint (.pt), or it is damaged") from None
    if found != FORMAT:
        raise UserError(
            f"{path} was written by an incompatible version (its format is {found}, not {FORMAT}); train "
            "again, or use the version that wrote it"
        )
    return content


def hash_network(network: dict[str, Tensor]) -> str:
    """Return a digest of a network's weights, equal only if every bit of them is."""
    digest = hashlib.sha256()
    for name in sorted(network):
        digest.update(name.encode() + network[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class RunFolder:
    """The folder `checkpoint_dir/<run id>` of a run, locked by one process at a time.

    Attributes:
        best: The network of the best epoch, which is evaluated, logged and served.
        last: The whole state to resume from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last = path / "best.pt", path / "last.pt"
        self._lock = filelock.FileLock(path / "running.lock", timeout=0)

    def acquire(self) -> None:
        """Create the folder if needed, and lock it until `release` or the end of the process.

        Raises:
            UserError: Another process has locked it, or it is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"run {self.path.name} is already being trained by another process") from None
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path} ({error.strerror or error}); set another checkpoint_dir"
            ) from None

    def release(self, *, keep_lock_file: bool = False) -> None:
        """Release the folder, and remove it if it is empty."""
        if not keep_lock_file:
            with contextlib.suppress(OSError):
                (self.path / "running.lock").unlink()
        self._lock.release()
        with contextlib.suppress(OSError):  # it is not empty
            self.path.rmdir()
            self.path.parent.rmdir()

    def remove(self) -> None:
        """Remove the checkpoints and release the folder."""
        for path in (self.last, self.best, *self.path.glob(".*.tmp")):
            path.unlink(missing_ok=True)
        self.release()

    def read_state(self) -> dict[str, Any]:
        """Read the state to resume from; none, or a damaged one, is a UserError."""
        if not self.last.is_file():
            raise UserError(
                f"cannot resume run {self.path.name}: {self.path} has no {self.last.name}. It has finished, "
                "never started training, or was started with another checkpoint_dir"
            )
        return read_checkpoint(self.last)


def list_interrupted(checkpoint_dir: Path) -> list[RunFolder]:
    """Return the folders of runs that can be resumed, the latest first; some may be training or ending."""
    ages = {}
    for path in checkpoint_dir.glob("*/last.pt"):
        with contextlib.suppress(OSError):  # its run has finished meanwhile
            ages[path] = path.stat().st_mtime
    return [RunFolder(path.parent) for path in sorted(ages, key=ages.__getitem__, reverse=True)]


def clean_up_killed(checkpoint_dir: Path, end_run: Callable[[str], str]) -> None:
    """End the runs whose process was killed, and remove the checkpoints that none of them needs.

    `end_run` ends a run in the tracking store if it has not ended, and returns its status; empty if the store
    does not know it or is unreachable.
    """
    files = {*checkpoint_dir.glob("*/running.lock"), *checkpoint_dir.glob("*/last.pt")}
    for path in sorted({file.parent for file in files}):
        folder = RunFolder(path)
        with contextlib.suppress(UserError):  # its process is alive
            folder.acquire()
            status = end_run(folder.path.name)
            if status == "FINISHED" or (status and not folder.last.exists()):
                folder.remove()
            else:
                folder.release(keep_lock_file=not status)  # by which the next start finds it
