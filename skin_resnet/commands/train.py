"""The command `train`: from a data set to a tracked, tested network."""

import shlex
from contextlib import ExitStack

import pandas as pd

from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData, open_test
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.evaluation.report import describe_training
from skin_resnet.tracking.history import log_test_access
from skin_resnet.tracking.run import TrackedRun, close_abandoned, describe_location, is_project_run, open_run
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.checkpoint import RunFolder, clean_up_killed, read_checkpoint
from skin_resnet.training.device import explain_out_of_memory, is_out_of_memory
from skin_resnet.training.engine import NonFiniteLossError, to_frame
from skin_resnet.training.resume import ResumePoint, find_resume_point
from skin_resnet.training.run import TrainResult, run_training, take_part


def train(config: TrainConfig) -> None:
    """Train in an MLflow run of its own, evaluate the best epoch on test, and print where all of it is.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    if take_part():
        return
    prepare_store()
    started_by_project = is_project_run()  # asked now: opening the run hides it
    checkpoint_dir = config.checkpoint_dir.expanduser()
    clean_up_killed(checkpoint_dir, close_abandoned)
    with ExitStack() as stack:
        # Held before the run is opened, which another process may be training, and until it has ended.
        point = find_resume_point(config)
        stack.callback(lambda: point.folder.release() if point else None)
        run = stack.enter_context(open_run(run_id=point.folder.path.name if point else None))
        if point is None:
            point = ResumePoint(folder=RunFolder(checkpoint_dir / run.run_id), config=config)
            point.folder.acquire()
        try:
            _train_and_test(run, point)
        except BaseException as error:
            # What diverged would diverge again.
            if point.folder.last.exists() and not isinstance(error, NonFiniteLossError):
                command = _write_resume_command(point.config, run.run_id, by_project=started_by_project)
                print(f"\nresume with: {command}")
            raise
    print(f"\n{describe_location(run.run_id)}")


def _write_resume_command(config: TrainConfig, run_id: str, *, by_project: bool) -> str:
    """Return the command that resumes a run; all else that it needs is in the run's state."""
    options = {"resume": run_id}
    if config.checkpoint_dir != TrainConfig.model_fields["checkpoint_dir"].default:
        options["checkpoint_dir"] = str(config.checkpoint_dir)
    if by_project:
        typed = [part for name, value in options.items() for part in ("-P", f"{name}={value}")]
        return f"{shlex.join(['mlflow', 'run', '.', *typed])} (and --env-manager as before)"
    typed = [part for name, value in options.items() for part in (f"--{name}", value)]
    return shlex.join(["python", "-m", "skin_resnet", "train", *typed])


def _train_and_test(run: TrackedRun, point: ResumePoint) -> None:
    config = point.config
    run.log_params(config)
    try:
        result = run_training(config, tracker=run, resume=point)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(config) from None
    text = report(run, result)
    print(f"\n{text}\n")
    page = _test(run, result) if config.test == "at_end" else ""
    print(page)
    # The page of a run shows the first lines only: the test comes first there.
    run.describe(f"{page}\n\n{text}".strip())
    run.log_model(result.checkpoint_path, result.data.classes)


def report(run: TrackedRun, result: TrainResult) -> str:
    """Log and return a training's report."""
    classes_in_val = result.data.select(result.data.split.val).dx.nunique()
    text = describe_training(to_frame(result.history), result.best.epoch, result.config, classes_in_val)
    if result.data.leakage.leaks:
        text = f"{LEAK_BANNER}\n\n{text}"
    run.log_artifacts({"report.md": text})
    return text


def open_test_split(run: TrackedRun, config: TrainConfig, data: PreparedData) -> tuple[pd.DataFrame, str]:
    """Open the test split for an evaluation in a run: the only place that does so.

    Returns:
        The rows of the test images with their diagnoses, and a warning if other runs have used it before.
    """
    warning = log_test_access(run.run_id, data.split.hash)
    return open_test(config, data), warning


def _test(run: TrackedRun, result: TrainResult) -> str:
    table, warning = open_test_split(run, result.config, result.data)
    checkpoint = read_checkpoint(result.checkpoint_path)
    return assess_and_log(run, checkpoint, table, result.data.store, result.config, warning)
