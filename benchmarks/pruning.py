"""What pruning saves, and what it costs: `python -m benchmarks.pruning STORAGE STUDY [STUDY ...]`.

The studies are made without pruning and with draws that do not depend on results, one for each seed:

    skin-resnet search --storage STORAGE --study_name NAME --seed SEED --sampler random --pruner none ...

Their trials are then replayed with each pruner, epoch by epoch: it does to them what it would have done in a
search with one worker, as the same options and seed give the same epochs. The objective is val loss.
"""

import sys
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks.results import keep
from search.config import SearchConfig
from search.study import build_pruner, drop_retried
from skin_resnet.evaluation.page import format_table

PRUNERS = ("none", "median", "halving", "hyperband")


def replay(recorded: Sequence[FrozenTrial], config: SearchConfig) -> tuple[int, float]:
    """Return how many epochs the trials would have trained with a config's pruner, and their best value."""
    # By the study's name and the trial's number, Hyperband chooses a trial's bracket.
    study = optuna.create_study(pruner=build_pruner(config), study_name=config.study_name)
    epochs = 0
    for old in recorded:
        trial = study.ask()
        for epoch, value in sorted(old.intermediate_values.items()):
            epochs += 1
            trial.report(value, epoch)
            if "baseline" not in old.user_attrs and epoch < config.epochs and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, old.value)
    return epochs, study.best_value


def main() -> None:
    """Replay the studies with each pruner and keep the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, *names = sys.argv[1:]
    rows, notes = [], []
    for name in names:
        trials = drop_retried(optuna.load_study(study_name=name, storage=storage).trials)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        assert len(done) == len(trials), f"{name} has trials that did not end, or failed"
        all_epochs = max(len(trial.intermediate_values) for trial in done)
        notes.append(f"{name}: {len(done)} trials of {all_epochs} epochs")
        for pruner in PRUNERS:
            config = SearchConfig(study_name=name, storage=storage, pruner=pruner, epochs=all_epochs)
            epochs, best = replay(done, config)
            whole = len(done) * all_epochs
            rows.append([name, pruner, str(epochs), f"{whole / epochs:.2f}x", f"{best:.4f}"])
    table = format_table(["study", "pruner", "epochs", "fewer", "best value"], rows)
    keep("pruning", f"{'; '.join(notes)}. The values are val losses.\n\n{table}", data=" ".join(names))


if __name__ == "__main__":
    main()
