"""What a training keeps on disk: the best network, its whole state, and a sign that it lives."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skin_resnet.data.folders import lock_file
from skin_resnet.errors import UserError
from skin_resnet.training import interrupts
from skin_resnet.training.checkpoint import read_checkpoint, save_checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: `checkpoint_dir/<run id>`.
    """

    path: Path

    @property
    def best(self) -> Path:
        """The network of the best epoch: what is scored, logged and served."""
        return self.path / "best.pt"

    @property
    def last(self) -> Path:
        """The whole state, to go on from; there until the run has finished."""
        return self.path / "last.pt"

    @property
    def _lock(self) -> Path:
        return self.path / "running.lock"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder while the run lives. The operating system lets go of it however the process ends.

        Raises:
            UserError: Another process holds it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                is_ours = stack.enter_context(lock_file(self._lock, wait=False))
            except OSError as error:
                raise UserError(
                    f"checkpoint_dir must be a folder that can be written, but {self.path}: "
                    f"{error.strerror or error}; choose another."
                ) from None
            if not is_ours:
                raise UserError(
                    f"a run can be trained by one process only, but another one is at {self.path.name}; wait "
                    "for it, or stop it."
                )
            yield

    def leave(self, close: Callable[[str], bool]) -> None:
        """Remove the sign that the run lives, and a folder with nothing in it.

        Args:
            close: Given a run's id, ends it in MLflow where it is not; says whether it is ended now. If not,
                the sign stays, and the next start tries again.
        """
        if close(self.path.name):
            self._lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is something in it
                self.path.rmdir()
                self.path.parent.rmdir()


def list_runs(checkpoint_dir: Path) -> list[RunFolder]:
    """List the folders of runs that have a state to go on from, the one saved last first."""
    states = sorted(checkpoint_dir.glob("*/last.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunFolder(path.parent) for path in states]


def release_abandoned(checkpoint_dir: Path, close: Callable[[str], bool]) -> None:
    """Find the runs whose process died before it could end them.

    Args:
        checkpoint_dir: Where the folders are.
        close: Given a run's id, ends it in MLflow; says whether it is ended now.
    """
    for lock in sorted(checkpoint_dir.glob("*/running.lock")):
        run = RunFolder(lock.parent)
        try:
            with run.hold():
                run.leave(close)
        except UserError:
            continue  # its process lives


class Keeper:
    """Saves a training's whole state: when told, every few minutes, and when the process is asked to end.

    Args:
        path: Where.
        describe: Gives what to save.
        minutes: Between two savings within an epoch; 0: not even when the process is asked to end.
    """

    def __init__(self, path: Path, describe: Callable[[], dict[str, Any]], minutes: float) -> None:
        self._path, self._describe, self._pause_s = path, describe, 60 * minutes
        self._saved_at_s = time.monotonic()  # no clock that someone may set back

    def save(self) -> None:
        """Save the state as it is.

        Raises:
            UserError: It cannot be written; the one before is still there.
        """
        save_checkpoint(self._path, self._describe())
        self._saved_at_s = time.monotonic()

    def on_batch(self) -> None:
        """Save if it is time to, and heed a signal.

        Raises:
            KeyboardInterrupt: The process was asked to end; all up to here is saved.
        """
        is_due = time.monotonic() - self._saved_at_s >= self._pause_s or interrupts.is_asked()
        if self._pause_s > 0 and is_due:
            self.save()
        interrupts.check()


def require_state(run: RunFolder) -> None:
    """Make sure that a run has a state to go on from, without reading it.

    Raises:
        UserError: It has none.
    """
    if not run.last.is_file():
        raise UserError(
            f"resume needs a run that was stopped after its training began, but {run.path} has no "
            f"{run.last.name}: it has finished, or never began, or is kept elsewhere (checkpoint_dir); "
            "start a new run."
        )


def read_state(run: RunFolder) -> dict[str, Any]:
    """Read a run's whole state.

    Raises:
        UserError: It has none, or it is damaged.
    """
    require_state(run)
    state = read_checkpoint(run.last)
    if "history" not in state:
        raise UserError(
            f"resume needs the state of a run, but {run.last} is another checkpoint; see {run.path}."
        )
    return state
