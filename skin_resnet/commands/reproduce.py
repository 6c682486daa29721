"""The command `reproduce`: repeats a finished training and compares the two bit by bit."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from skin_resnet.commands.config import ReproduceConfig
from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.page import format_table, print_markdown
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.links import describe_location
from skin_resnet.tracking.run import open_run
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.run import run_training, take_part

_NOT_COMPARED = ("epoch_s", "images_per_s")  # durations are never the same twice
_SETTING = ("git.", "version.", "device", "precision", "threads", "data.fingerprint", "start")
_WEIGHTS = "best.sha256"
_DIFFERS = 1  # exit code


def reproduce(config: ReproduceConfig) -> int:
    """Repeat a training in a child run of it; return 0 if the two are bit-identical, else 1.

    Raises:
        UserError: There is no such run, or its data are gone.
    """
    if take_part():
        return 0
    prepare_store()
    with TemporaryDirectory() as folder:
        recorded, split = finished_runs.read_training(config.run, Path(folder))
        # The recorded split is used, however it was made.
        options = TrainConfig.model_validate(
            {
                **recorded, "split": str(split), "train_fraction": 1.0, "resume": "none",
                "cache_dir": config.cache_dir, "checkpoint_dir": config.checkpoint_dir,
            }
        )  # fmt: skip
        with open_run(f"reproduce · {config.run}", parent_run_id=config.run) as run:
            run_training(options, tracker=run)
            histories = map(finished_runs.read_history, (config.run, run.run_id))
            differences, compared = compare_histories(*histories)
            changes = find_changes(*map(finished_runs.read_tags, (config.run, run.run_id)))
            page = describe(config.run, differences, compared, changes)
            run.set_tags({finished_runs.REPRODUCES: config.run})
            run.log_metrics({"reproduce/values": compared, "reproduce/deviations": len(differences)})
            run.log_artifacts({"reproduction.md": page})
            run.describe(page)
            print_markdown(page)
    print(describe_location(run.run_id))
    return _DIFFERS if len(differences) or _WEIGHTS in changes else 0


def compare_histories(first: pd.DataFrame, again: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Compare two histories; a value that only one of them has counts as a difference.

    Returns:
        The values that differ, earliest epoch first (columns epoch, metric, first, again), and how many
        were compared.
    """
    values = {
        name: frame.drop(columns=list(_NOT_COMPARED), errors="ignore")
        .rename_axis(index="epoch", columns="metric")
        .stack()
        for name, frame in (("first", first), ("again", again))
    }
    both = pd.concat(values, axis=1).dropna(how="all").sort_index().reset_index()
    return both[both["first"] != both["again"]].reset_index(drop=True), len(both)


def find_changes(first: dict[str, str], again: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return what has changed, by tag: code, versions, hardware, data, and the resulting weights."""
    names = [name for name in sorted({*first, *again}) if name.startswith((*_SETTING, _WEIGHTS))]
    pairs = {name: (first.get(name, "-"), again.get(name, "-")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(
    run_id: str, differences: pd.DataFrame, compared: int, changes: dict[str, tuple[str, str]]
) -> str:
    """Return the result as a page of Markdown."""
    lines = [f"### Reproduction of run {run_id}", ""]
    if len(differences):
        start = differences.iloc[0]
        lines.append(
            f"**Not identical**: {len(differences)} of {compared} values differ. The first is "
            f"{start['metric']} of epoch {start['epoch']}: {start['first']}, now {start['again']} "
            f"({start['again'] - start['first']:+.3g})."
        )
    elif _WEIGHTS in changes:
        lines.append(f"**Not identical**: all {compared} values are equal, but the weights differ.")
    else:
        lines.append(
            f"**Bit-identical**: all {compared} values of all epochs, and the weights of the best one."
        )
    if setting := {name: pair for name, pair in changes.items() if name != _WEIGHTS}:
        lines += ["", "What has changed since:", ""]
        lines.append(format_table(["", "then", "now"], [[name, *pair] for name, pair in setting.items()]))
    return "\n".join(lines)
