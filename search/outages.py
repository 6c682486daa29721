"""Child runs of a search that outlast a tracking server that is away for a while."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from skin_resnet.errors import UserError
from skin_resnet.tracking.history import STATE
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.tracking.store import OUTAGES
from skin_resnet.training import interrupts
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.run import TrainResult, TrainStart

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_RETRY_S = 1.0
_OUTAGE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


class NotTrackedError(UserError):
    """A trial's run could not be opened: the trial does not count, and is run again."""


def wait_for_server(call: Callable[[], T], check_alive: Callable[[], None] = interrupts.check) -> T:
    """Return what a call to MLflow returns; while the tracking server is away, wait and call again.

    Raises:
        Exception: What the call raised other than for an outage, or `check_alive`.
    """
    for attempt in itertools.count():
        try:
            return call()
        except (UserError, *OUTAGES) as error:
            if not is_outage(error):
                raise
            if attempt == 0:
                _logger.warning("MLflow does not answer, waiting for it (%.200s)", error)
        for _ in range(min(2**attempt, 30)):
            check_alive()
            time.sleep(_RETRY_S)
    raise AssertionError("unreachable")


def is_outage(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, says that the tracking server is away for now."""
    if isinstance(error, OUTAGES):
        # MLflow's own errors have a code; one about the request itself would only come again.
        return getattr(error, "error_code", _OUTAGE_CODES[0]) in _OUTAGE_CODES
    return error is not None and is_outage(error.__context__)


@contextmanager
def open_child(
    name: str,
    parent_run_id: str,
    tags: Mapping[str, str],
    *,
    pruned: tuple[type[BaseException], ...] = (),
    check_alive: Callable[[], None] = interrupts.check,
) -> Iterator[tuple[TrackedRun, "PatientTracker"]]:
    """Open a child run, as `open_run` does, and a tracker for a training in it.

    Raises:
        NotTrackedError: The run cannot be opened for another reason than an outage.
    """
    with ExitStack() as stack:

        def enter() -> TrackedRun:
            return stack.enter_context(open_run(name, parent_run_id=parent_run_id, tags=tags, pruned=pruned))

        try:
            run = wait_for_server(enter, check_alive)
        except UserError as error:
            raise NotTrackedError(f"{name} has no MLflow run: {error}") from error
        yield run, PatientTracker(run, check_alive)
        wait_for_server(lambda: run.set_tags({STATE: "COMPLETE"}), check_alive)  # so that the run can end


class PatientTracker:
    """Tracks a training, and waits at its start and end for a tracking server that is away.

    Args:
        run: The open run, which buffers epochs by itself.
        check_alive: Called while waiting; what it raises ends the training.
    """

    def __init__(self, run: TrackedRun, check_alive: Callable[[], None]) -> None:
        self.run_id = run.run_id
        self._run = run
        self._check_alive = check_alive

    def on_start(self, start: TrainStart) -> None:
        """Record the start."""
        wait_for_server(lambda: self._run.on_start(start), self._check_alive)

    def on_epoch(self, result: EpochResult) -> None:
        """Record an epoch."""
        self._run.on_epoch(result)

    def on_end(self, result: TrainResult) -> None:
        """Record the best epoch."""
        wait_for_server(lambda: self._run.on_end(result), self._check_alive)
