"""Resuming an interrupted run: which one, with which options, and only on the same data."""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.options import format_value
from skin_resnet.training.checkpoint import RunFolder, list_interrupted, read_checkpoint
from skin_resnet.training.engine import EpochResult, build_non_finite_error
from skin_resnet.training.state import TrainingState

# Options about where a run works, not about what it computes: they may change when it is resumed.
_MAY_CHANGE = ("data", "cache_dir", "checkpoint_dir", "checkpoint_minutes", "device", "register_as")


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run keeps its state, and the state it is resumed from.

    Attributes:
        folder: The run's, locked by this process (by the first one, if there are several).
        config: The options to train with.
        saved: What `describe_state` returned; None for a new run.
    """

    folder: RunFolder
    config: TrainConfig
    saved: dict[str, Any] | None = None

    @property
    def history(self) -> list[EpochResult]:
        """The epochs that had finished."""
        return [EpochResult.from_dict(fields) for fields in self.saved["history"]] if self.saved else []


def find_resume_point(config: TrainConfig) -> ResumePoint | None:
    """Find the run to resume and lock its folder; None if a new run is to be started.

    `resume=auto` takes the latest interrupted run with the same options that no other process is training.

    Raises:
        UserError: The given run cannot be resumed, or was started with other options.
    """
    checkpoint_dir = config.checkpoint_dir.expanduser()
    if config.resume == "none":
        return None
    if config.resume != "auto":
        if Path(config.resume).name != config.resume:
            raise UserError(f"resume={config.resume} is not a run id; copy it from the run's page")
        return _lock_and_read(RunFolder(checkpoint_dir / config.resume), config)
    for folder in list_interrupted(checkpoint_dir):
        # It may be in training, have finished meanwhile, be damaged, or have other options.
        with contextlib.suppress(UserError):
            return _lock_and_read(folder, config, takes_defaults=False)
    return None


def _lock_and_read(folder: RunFolder, config: TrainConfig, *, takes_defaults: bool = True) -> ResumePoint:
    """Lock a run's folder, read its state, and merge the options that may change into its own.

    With `takes_defaults`, an option given at its default is the run's own: `mlflow run` passes every option,
    so it was probably not typed.
    """
    folder.acquire()
    try:
        saved = folder.read_state()
        if saved["history"]:
            read_checkpoint(folder.best)  # damaged, the best epoch so far would be lost
        own, default = TrainConfig.model_validate(saved["config"]), TrainConfig.model_validate({})
        changes: dict[str, Any] = {}
        for name in TrainConfig.model_fields:
            value, before = getattr(config, name), getattr(own, name)
            is_own = value == before or (takes_defaults and value == getattr(default, name))
            if is_own or name == "resume":
                continue
            if name not in _MAY_CHANGE or (name == "data" and not takes_defaults):
                raise UserError(
                    f"run {folder.path.name} was started with {name}={format_value(before)} and cannot be "
                    f"resumed with {name}={format_value(value)}; leave the option out, or start a new run"
                )
            changes[name] = value
        return ResumePoint(folder=folder, config=own.with_changes(**changes), saved=saved)
    except BaseException:
        folder.release()
        raise


def describe_state(state: TrainingState, fingerprint: str, history: list[EpochResult]) -> dict[str, Any]:
    """Return all that another process needs to continue exactly here; the best epoch is in the history.

    Raises:
        NonFiniteLossError: The network is broken. A GPU's losses are checked less often than states are
            saved, and the last whole state must not be overwritten.
    """
    if state.seen is not None and not (is_finite := state.seen.isfinite().all(dim=1)).all():
        raise build_non_finite_error("the loss", "nan", state, (~is_finite).nonzero().flatten())
    return {
        "config": state.config.model_dump(mode="json"),
        "data_fingerprint": fingerprint,
        "state": state.state_dict(),
        "history": [dataclasses.asdict(result) for result in history],
    }


def restore(point: ResumePoint, state: TrainingState, fingerprint: str) -> None:
    """Restore a training's saved state, if there is one.

    Raises:
        UserError: The data, named by `fingerprint`, are not those that the run was trained on.
    """
    if point.saved is None:
        return
    before = point.saved["data_fingerprint"]
    if before != fingerprint:
        raise UserError(
            f"cannot resume: the split or the pixels of data={state.config.data} have changed since the run "
            f"was interrupted ({fingerprint} instead of {before}); restore the data, or start a new run"
        )
    state.load_state_dict(point.saved["state"])
