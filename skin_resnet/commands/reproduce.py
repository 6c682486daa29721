"""The command `reproduce`: runs a finished training again, and compares it with the first to the last bit."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from skin_resnet.config import ReproduceConfig, TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.evaluation.formatting import format_table
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking import log_setting
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking.epoch_log import to_figures
from skin_resnet.training.run import run_training

_NOT_COMPARED = ("speed/epoch_s", "speed/images_per_s")  # a clock is never the same twice
_SETTING = ("git.", "version.", "device", "precision", "threads", "data.fingerprint", "start")
_WEIGHTS = "best.sha256"
# Options that runs of earlier versions do not have, whose defaults are what those did.
_NEWER = ("train_fraction", "checkpoint_minutes", "resume")
_DIFFERS = 1  # exit code

Histories = dict[str, dict[int, float]]  # values by metric and epoch


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A value that came out otherwise."""

    epoch: int
    metric: str
    first: float
    again: float


def reproduce(config: ReproduceConfig) -> int:
    """Train again what a run trained, in a child run of it; give 0 where all is bit-identical, else 1.

    Raises:
        UserError: There is no such run, or what it was trained on is no more.
    """
    mlflow_run.set_up()
    with TemporaryDirectory() as folder:
        first = finished_runs.read_training(config.run, Path(folder))
        options = _read_options(first, config)
        with mlflow_run.open_run(f"reproduction of {config.run}", parent_run_id=config.run) as run_id:
            log_setting.log_versions()
            result = run_training(options)
            histories: Histories = {}
            for epoch in result.history:
                for name, value in to_figures(epoch).items():
                    histories.setdefault(name, {})[epoch.epoch] = value
            deviations, compared = compare_histories(first.history, histories)
            changed = find_changes(first.tags, mlflow_run.read_tags(run_id))
            page = describe(config.run, deviations, compared, changed)
            mlflow_run.set_tags({"reproduces": config.run})
            mlflow_run.log_metrics({"reproduce/values": compared, "reproduce/deviations": len(deviations)})
            mlflow_run.log_text(page, "reproduction.md")
            mlflow_run.log_note(page)
            print(f"\n{page}\n")
    print(mlflow_run.describe_location(run_id))
    return _DIFFERS if deviations or _WEIGHTS in changed else 0


def _read_options(first: finished_runs.RecordedTraining, config: ReproduceConfig) -> TrainConfig:
    """Give the options of a run, from its params: its split is the one on record, whatever made it."""
    known = {name: text for name, text in first.params.items() if name in TrainConfig.model_fields}
    unknown = sorted(set(TrainConfig.model_fields) - set(known) - set(_NEWER))
    if unknown:
        raise UserError(f"run must be a training with all its params, but {config.run} has no {unknown[0]}.")
    return TrainConfig.model_validate(known).with_changes(
        split=str(first.split), train_fraction=1.0, resume="none", cache_dir=config.cache_dir,
        checkpoint_dir=config.checkpoint_dir,
    )  # fmt: skip


def compare_histories(first: Histories, again: Histories) -> tuple[list[Deviation], int]:
    """Compare two trainings epoch by epoch; a value that one of them lacks deviates.

    Returns:
        The values that differ, earliest epoch first, and how many were compared.
    """
    nan = float("nan")
    deviations, compared = [], 0
    names = sorted({*first, *again} - set(_NOT_COMPARED))
    epochs = sorted({epoch for name in names for epoch in {**first.get(name, {}), **again.get(name, {})}})
    for epoch in epochs:
        for name in names:
            one, other = first.get(name, {}).get(epoch), again.get(name, {}).get(epoch)
            compared += one is not None or other is not None
            if one != other:
                one, other = nan if one is None else one, nan if other is None else other
                deviations.append(Deviation(epoch=epoch, metric=name, first=one, again=other))
    return deviations, compared


def find_changes(first: dict[str, str], again: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Find what is no longer as it was: code, versions, hardware, data, and the network that came out."""
    names = [name for name in sorted({*first, *again}) if name.startswith((*_SETTING, _WEIGHTS))]
    pairs = {name: (first.get(name, "-"), again.get(name, "-")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(
    run_id: str, deviations: list[Deviation], compared: int, changed: dict[str, tuple[str, str]]
) -> str:
    """Tell what came of it."""
    lines = [f"### Reproduction of run {run_id}", ""]
    if deviations:
        start = deviations[0]
        lines.append(
            f"**Not the same**: {len(deviations)} of {compared} values differ. The first is {start.metric} "
            f"of epoch {start.epoch}: {start.first!r}, now {start.again!r}, {start.again - start.first:+.3g}."
        )
    elif _WEIGHTS in changed:
        lines.append(f"**Not the same**: all {compared} values are, but the network's weights differ.")
    else:
        lines.append(
            f"**Bit-identical**: all {compared} values of all epochs, and the weights of the best one."
        )
    if setting := {name: pair for name, pair in changed.items() if name != _WEIGHTS}:
        lines += ["", "What is no longer as it was:", ""]
        lines.append(format_table(["", "then", "now"], [[name, *pair] for name, pair in setting.items()]))
    return "\n".join(lines)
