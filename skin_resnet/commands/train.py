"""The command `train`: from a data set to a tracked, tested network."""

import os
import shlex
from contextlib import ExitStack

import pandas as pd

from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData, open_test
from skin_resnet.errors import UserError
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.evaluation.report import describe_training
from skin_resnet.tracking import log_setting
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking.epoch_log import to_frame
from skin_resnet.tracking.openings import record_opening
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.engine import NonFiniteLossError
from skin_resnet.training.resume import Kept, find_stopped_run, read_kept
from skin_resnet.training.run import TrainResult, run_training
from skin_resnet.training.run_folder import RunFolder, release_abandoned
from skin_resnet.training.state import is_out_of_memory


def train(config: TrainConfig) -> None:
    """Train in an MLflow run of its own, score the best epoch on test, and print where all of it is.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    stopped = find_stopped_run(config)
    if _get_rank() > 0:  # a process that Fabric started: it takes part, and leaves the rest to the first
        kept, config = read_kept(stopped, config) if stopped else (None, config)
        run_training(config, kept=kept)
        return
    mlflow_run.set_up()
    is_project_run = mlflow_run.is_project_run()  # asked now: to open the run takes the sign of it away
    release_abandoned(config.checkpoint_dir.expanduser(), mlflow_run.close_abandoned)
    with ExitStack() as stack:
        kept = None
        if stopped:  # held before its run is opened, which another process may be at
            stack.enter_context(stopped.hold())
            kept, config = read_kept(stopped, config)
        # Left after the run: what is called by then knows whether MLflow was told of its end.
        leaving = stack.enter_context(ExitStack())
        run_id = stack.enter_context(
            mlflow_run.open_run("training under way", stopped.path.name if stopped else None)
        )
        if kept is None:
            kept = Kept(folder=RunFolder(config.checkpoint_dir.expanduser() / run_id))
            stack.enter_context(kept.folder.hold())
        leaving.callback(kept.folder.leave, mlflow_run.close_abandoned)
        try:
            _train_and_test(config, kept)
        except BaseException as error:
            # What went to the infinite would go there again.
            if kept.folder.last.exists() and not isinstance(error, NonFiniteLossError):
                print(f"\ngo on with it: {_write_resume(config, run_id, is_project_run=is_project_run)}")
            raise
    kept.folder.last.unlink()  # a run that has finished is not gone on with
    print(f"\n{mlflow_run.describe_location(run_id)}")


def _write_resume(config: TrainConfig, run_id: str, *, is_project_run: bool) -> str:
    """Write the command that goes on with a run; all else that it needs is in the run's state."""
    options = {"resume": run_id}
    if config.checkpoint_dir != TrainConfig.model_fields["checkpoint_dir"].default:
        options["checkpoint_dir"] = str(config.checkpoint_dir)
    if is_project_run:
        typed = [part for name, value in options.items() for part in ("-P", f"{name}={value}")]
        return f"{shlex.join(['mlflow', 'run', '.', *typed])} (and --env-manager as before)"
    typed = [part for name, value in options.items() for part in (f"--{name}", value)]
    return shlex.join(["python", "-m", "skin_resnet", "train", *typed])


def _train_and_test(config: TrainConfig, kept: Kept) -> None:
    mlflow_run.log_params(config)
    log_setting.log_versions()
    try:
        result = run_training(config, kept=kept)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"a step must fit into the memory, but batch_size={config.batch_size} and image_size="
            f"{config.image_size} do not; try batch_size={max(2, config.batch_size // 2)}, or a smaller "
            "image_size."
        ) from None
    text = report(config, result)
    print(f"\n{text}\n")
    page = _test(config, result) if config.test == "at_end" else ""
    print(page)
    # The UI shows the first lines only: the test comes first there.
    mlflow_run.log_note(f"{page}\n\n{text}".strip())
    mlflow_run.log_model(result.checkpoint, result.data.classes)


def report(config: TrainConfig, result: TrainResult) -> str:
    """Tell a training in words, on the open run."""
    classes_in_val = result.data.select(result.data.split.val).dx.nunique()
    text = describe_training(to_frame(result.history), result.best.epoch, config, classes_in_val)
    if result.data.leakage.leaks:
        text = f"{LEAK_BANNER}\n\n{text}"
    mlflow_run.log_text(text, "report.md")
    return text


def break_seal(config: TrainConfig, data: PreparedData) -> tuple[pd.DataFrame, str]:
    """Open the test split, once, on the open run: the one place that does.

    Returns:
        The rows of the test images with their diagnoses, and a warning where others have opened it before.
    """
    warning = record_opening(data.split.hash)
    return open_test(config, data), warning


def _test(config: TrainConfig, result: TrainResult) -> str:
    table, warning = break_seal(config, result.data)
    checkpoint = read_checkpoint(result.checkpoint)
    return assess_and_log(checkpoint, table, result.data.store, config, "test", warning)


def _get_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
