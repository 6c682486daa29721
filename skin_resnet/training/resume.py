"""Going on with a run that was stopped: which one, by which options, and whether its data are the same."""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.options import format_value
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.engine import build_non_finite_error
from skin_resnet.training.run_folder import RunFolder, list_runs, read_state, require_state
from skin_resnet.training.state import TrainingState

# Options that say where a run works, not what it computes: given anew, they hold for the rest of it.
_MAY_MOVE = ("data", "cache_dir", "checkpoint_dir", "checkpoint_minutes", "device")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where a run keeps its state, and what it kept before it was stopped.

    Attributes:
        folder: The run's.
        before: The state to go on from; None for a new run.
    """

    folder: RunFolder
    before: dict[str, Any] | None = None

    @property
    def history(self) -> list[EpochResult]:
        """The epochs that had finished."""
        return [EpochResult.from_dict(fields) for fields in self.before["history"]] if self.before else []


def find_stopped_run(config: TrainConfig) -> RunFolder | None:
    """Find the run to go on with; None where a new one is wanted.

    Raises:
        UserError: There is no such run to go on with.
    """
    checkpoint_dir = config.checkpoint_dir.expanduser()
    if config.resume == "none":
        return None
    if config.resume != "auto":
        folder = RunFolder(checkpoint_dir / config.resume)
        require_state(folder)
        return folder
    return next((run for run in list_runs(checkpoint_dir) if _is_same_training(run, config)), None)


def _is_same_training(run: RunFolder, config: TrainConfig) -> bool:
    try:
        before = TrainConfig.model_validate(read_state(run)["config"])
    except UserError:
        return False  # damaged, or by another version: nothing to go on with unasked
    where = {name: getattr(config, name) for name in ("resume", *_MAY_MOVE) if name != "data"}
    return before.with_changes(**where) == config


def read_kept(folder: RunFolder, config: TrainConfig) -> tuple[Kept, TrainConfig]:
    """Read what a stopped run kept, and with which options it goes on: its own.

    Raises:
        UserError: It cannot be read, or an option is given that the run does not have.
    """
    state = read_state(folder)
    own = TrainConfig.model_validate(state["config"])
    defaults = TrainConfig.model_validate({})
    moved = {"resume": config.resume}
    for name in TrainConfig.model_fields:
        value, before = getattr(config, name), getattr(own, name)
        # `mlflow run` passes every option, so one at its default was not asked for.
        if name == "resume" or value in (before, getattr(defaults, name)):
            continue
        if name not in _MAY_MOVE:
            raise UserError(
                f"resume goes on with a run's own options, but {folder.path.name} has {name}="
                f"{format_value(before)} and got {format_value(value)}; leave it out, or start a new run."
            )
        moved[name] = value
    if state["history"]:
        read_checkpoint(folder.best)  # the best epoch may lie behind: without its network, all is lost
    return Kept(folder=folder, before=state), own.with_changes(**moved)


def describe_state(
    state: TrainingState, data: str, history: list[EpochResult], run_id: str | None
) -> dict[str, Any]:
    """Give all that another process needs to go on exactly here.

    Early stopping and the best epoch follow from the history; order, augmentation and dropout from seed,
    epoch and step.

    Args:
        state: What training changes.
        data: The fingerprint of what it is trained on.
        history: The epochs that have finished.
        run_id: The MLflow run's; None where there is none.

    Raises:
        NonFiniteLossError: The network is broken. A GPU is asked for that less often than states are saved,
            and the state before must not be lost for this one.
    """
    if state.seen is not None and not (is_whole := state.seen.isfinite().all(dim=1)).all():
        positions = (~is_whole).nonzero().flatten()
        raise build_non_finite_error("the loss", "nan", state.epoch + 1, state.config.lr, positions)
    return {
        "config": state.config.model_dump(mode="json"),
        "run_id": run_id or "",
        "data": data,
        "state": state.state_dict(),
        "history": [dataclasses.asdict(result) for result in history],
    }


def restore(kept: Kept, state: TrainingState, data: str) -> None:
    """Put a training's state back to where it was kept; `data` is the fingerprint of what it is trained on.

    Raises:
        UserError: The data are no longer those that it was trained on.
    """
    if kept.before is None:
        return
    if kept.before["data"] != data:
        raise UserError(
            f"resume needs the data that the run was trained on, but {state.config.data} gives another split "
            f"or other pixels ({data}, not {kept.before['data']}); put them back, or start "
            "a new run."
        )
    state.load_state_dict(kept.before["state"])


def fingerprint(data: PreparedData) -> str:
    """Name what is learnt from: the split, and every pixel as it was decoded. It reads all of them."""
    return f"{data.split.hash}-{data.store.image_size}px-{zlib.crc32(data.store.pixels.data):08x}"
