"""The command `train`: from a data set to a tracked, tested network."""

import os
import shlex
import textwrap
from contextlib import ExitStack
from typing import Any

import pandas as pd

from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData, open_test
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.card import CARD, write_card
from skin_resnet.evaluation.page import LEAK_BANNER, format_score, format_summary, print_markdown
from skin_resnet.evaluation.report import describe_training
from skin_resnet.tracking.history import close_abandoned, log_test_access, read_tags
from skin_resnet.tracking.links import describe_location, show_figure
from skin_resnet.tracking.registry import register_run
from skin_resnet.tracking.run import TrackedRun, is_project_run, open_run
from skin_resnet.tracking.store import describe_uri, prepare_store
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
    by_project = is_project_run()  # asked now: opening the run hides it
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
            result = _train_and_test(run, point)
        except BaseException as error:
            # What diverged would diverge again.
            if point.folder.last.exists() and not isinstance(error, NonFiniteLossError):
                # All else that it needs is in the run's state.
                options = {"resume": run.run_id}
                if config.checkpoint_dir != TrainConfig.model_fields["checkpoint_dir"].default:
                    options["checkpoint_dir"] = str(config.checkpoint_dir)
                print(f"\nresume   {_write_command(run, 'train', options, by_project=by_project)}")
            raise
    # Without the run's name and id.
    print(f"\n{result}\n{describe_location(run.run_id).partition(chr(10))[2]}")
    next_commands = {
        "predict": {"model": run.run_id, "images": "FOLDER"},
        **({} if by_project else {"app": {"model": run.run_id}}),  # is no entry point of the project
        "compare": {"runs": f"{run.run_id},RUN_ID"},
    }
    for command, options in next_commands.items():
        print(f"{command:9}{_write_command(run, command, options, by_project=by_project)}")
    if point.config.register_as != "none":  # the run has ended: it stays finished if the registry fails
        print(_fill("registry", register_run(run.run_id, point.config.register_as)))


def _write_command(run: TrackedRun, command: str, options: dict[str, str], *, by_project: bool) -> str:
    """Return a command as it is typed: in the way, and the environment, in which this one was started."""
    if not by_project:
        typed = [part for name, value in options.items() for part in (f"--{name}", value)]
        # Those of other commands are required ones, which need no names.
        return shlex.join(["skin-resnet", command, *(typed if command == "train" else options.values())])
    # MLflow names the environment manager unless it is `local`, and the experiment to the process it starts.
    manager = read_tags(run.run_id).get("mlflow.project.env", "local")
    where = [f"--env-manager={manager}", f"--experiment-id={os.environ.get('MLFLOW_EXPERIMENT_ID', '0')}"]
    entry_point = [] if command == "train" else ["-e", command]
    typed = [part for name, value in options.items() for part in ("-P", f"{name}={value}")]
    return shlex.join(["mlflow", "run", ".", *where, *entry_point, *typed])


def _train_and_test(run: TrackedRun, point: ResumePoint) -> str:
    """Train and test in a run; return its result in lines to print."""
    config = point.config
    run.log_params(config)
    try:
        result = run_training(config, tracker=run, resume=point)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(config) from None
    text = report(run, result)
    assessment, page = _test(run, result) if config.test == "at_end" else (None, "")
    lines = {"test": format_result(assessment) if assessment else "not evaluated"}
    summary = format_summary(assessment, "test") if assessment else "Test was not evaluated."
    log_card(run, read_checkpoint(result.checkpoint_path), result.data, assessment)
    # The page of a run shows the first lines only.
    curves = show_figure(run.run_id, "figures/curves.png") if len(result.history) > 1 else ""
    run.describe("\n\n".join(filter(None, [summary, text, curves, page])))
    run.log_model(result.checkpoint_path)
    if config.print_report == "true":
        print_markdown(f"{text}\n\n{page}")
    lines["verdict"] = text.partition("\n")[0].replace("*", "")
    lines["report"] = f"{'test' if page else 'val'}/evaluation.md, among the artifacts on the run's page"
    return "\n".join(_fill(name, line) for name, line in lines.items())


def _fill(name: str, line: str) -> str:
    return textwrap.fill(
        line, 80, initial_indent=f"{name:9}", subsequent_indent=" " * 9, break_on_hyphens=False
    )


def format_result(assessment: Assessment) -> str:
    """Write the balanced accuracy beside that of the majority class, in 70 characters."""
    score, baseline = (assessment.get(f"{kind}balanced_accuracy") for kind in ("", "baseline_"))
    verdict = ": not better" if "balanced_accuracy" in assessment.find_not_better() else ""
    always = f"always {assessment.baseline_class} {baseline.value:.3f}"
    return f"balanced accuracy {format_score(score.value, (score.low, score.high))}; {always}{verdict}"


def report(run: TrackedRun, result: TrainResult) -> str:
    """Log and return a training's report."""
    classes_in_val = result.data.select(result.data.split.val).dx.nunique()
    text = describe_training(to_frame(result.history), result.best.epoch, result.config, classes_in_val)
    train, val = result.final_train.balanced_accuracy, result.history[-1].val.balanced_accuracy
    text += (
        f"\n\nWithout augmentation, the last epoch's network has a balanced accuracy of {train:.3f} on as "
        f"many train images as val has, and of {val:.3f} on val: a final gap of {result.final_gap:+.3f}."
    )
    if result.data.leakage.leaks:
        text = f"{LEAK_BANNER}\n\n{text}"
    run.log_artifacts({"report.md": text})
    return text


def log_card(
    run: TrackedRun, checkpoint: dict[str, Any], data: PreparedData, assessment: Assessment | None = None
) -> None:
    """Log a training's model card, with its evaluation on test; on val if there is none."""
    shown, split = (assessment, "test") if assessment else (run.val_assessment, "val")
    run.log_artifacts({CARD: write_card(checkpoint, data, shown, split, describe_uri())})


def open_test_split(run: TrackedRun, config: TrainConfig, data: PreparedData) -> tuple[pd.DataFrame, str]:
    """Open the test split for an evaluation in a run: the only place that does so.

    Returns:
        The rows of the test images with their diagnoses, and a warning if other runs have used it before.
    """
    warning = log_test_access(run.run_id, data.split.hash)
    return open_test(config, data), warning


def _test(run: TrackedRun, result: TrainResult) -> tuple[Assessment, str]:
    table, warning = open_test_split(run, result.config, result.data)
    checkpoint = read_checkpoint(result.checkpoint_path)
    return assess_and_log(run, checkpoint, table, result.data.store, result.config, warning)
