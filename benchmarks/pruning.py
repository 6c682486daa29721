"""What pruning saves, and what it costs: `python -m benchmarks.pruning STORAGE STUDY [STUDY ...]`.

The studies are made without pruning and with draws that do not depend on results, one for each seed:

    skin-resnet search --storage STORAGE --study_name NAME --seed SEED --sampler random --pruner none ...

Their trials are then replayed with each pruner, epoch by epoch, in many orders: it does to them what it would
have done in a search with one worker, as the same options and seed give the same epochs. The objective is val
loss. The baselines are never pruned, and are usually the best: "best" is that of the drawn trials.
"""

import math
import random
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks.results import keep
from search.config import SearchConfig
from search.study import build_pruner, drop_retried
from skin_resnet.evaluation.page import format_table

PRUNERS = ("median", "halving", "hyperband")
ORDERS = 25


def replay(recorded: Sequence[FrozenTrial], config: SearchConfig) -> tuple[int, float]:
    """Return how many epochs trials would train with a pruner, and the best of the drawn values."""
    # By the study's name and the trial's number, Hyperband chooses a trial's bracket.
    study = optuna.create_study(pruner=build_pruner(config), study_name=config.study_name)
    epochs, best = 0, math.inf
    for old in recorded:
        trial, is_baseline = study.ask(), "baseline" in old.user_attrs
        for epoch, value in sorted(old.intermediate_values.items()):
            epochs += 1
            trial.report(value, epoch)
            if not is_baseline and epoch < config.epochs and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, old.value)
            best = best if is_baseline else min(best, old.value)
    return epochs, best


def shuffle(trials: Sequence[FrozenTrial], seed: int) -> list[FrozenTrial]:
    """Return the baselines, and then the others in a random order: they were drawn independently."""
    baselines = [trial for trial in trials if "baseline" in trial.user_attrs]
    drawn = [trial for trial in trials if "baseline" not in trial.user_attrs]
    random.Random(seed).shuffle(drawn)
    return baselines + drawn


def main() -> None:
    """Replay the studies in many orders with each pruner and keep the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # Hyperband is experimental
    storage, *names = sys.argv[1:]
    rows, notes = [], []
    for name in names:
        trials = drop_retried(optuna.load_study(study_name=name, storage=storage).trials)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        assert len(done) == len(trials), f"{name} has trials that did not end, or failed"
        all_epochs = max(len(trial.intermediate_values) for trial in done)
        whole, best = replay(done, SearchConfig(study_name=name, pruner="none", epochs=all_epochs))
        notes.append(f"{name}: {len(done)} trials of {all_epochs} epochs, best drawn val loss {best:.3f}")
        for pruner in PRUNERS:
            config = SearchConfig(study_name=name, pruner=pruner, epochs=all_epochs)
            replayed = [replay(shuffle(done, seed), config) for seed in range(ORDERS)]
            epochs, losses = (np.array(column) for column in zip(*replayed, strict=True))
            rows.append(
                [
                    name, pruner, f"{whole / epochs.mean():.2f}x", f"{(losses == best).mean():.0%}",
                    f"{losses.mean() - best:.3f}",
                ]
            )  # fmt: skip
    header = ["study", "pruner", "fewer epochs", "best recipe kept", "val loss added"]
    text = f"{'; '.join(notes)}. Means over {ORDERS} orders of the trials.\n\n{format_table(header, rows)}"
    keep("pruning", text, data=" ".join(names))


if __name__ == "__main__":
    main()
