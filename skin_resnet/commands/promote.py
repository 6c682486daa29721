"""The command `promote`: the challenger of a registered model becomes its champion if it is better on val."""

import textwrap

from skin_resnet.commands.compare import format_difference, predict_baseline, read_predictions
from skin_resnet.commands.config import PromoteConfig
from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.metrics import compare_models, is_better
from skin_resnet.tracking.history import FinishedRun, read_run
from skin_resnet.tracking.registry import find_contenders, make_champion
from skin_resnet.tracking.run import open_project_run


def promote(config: PromoteConfig) -> int:
    """Make the challenger the champion if it is better on val; print why or why not. Return 0, or 1 if not.

    Raises:
        UserError: There is no such model or version, or the run of one is gone.
    """
    with open_project_run(f"promote · {config.name}") as run:  # what came of it is in the registry
        versions = find_contenders(config.name, config.challenger)
        wins, why = judge({f"version {key}": read_run(run_id, "val") for key, run_id in versions.items()})
        challenger, *present = versions
        if wins:
            make_champion(config.name, challenger, versions[challenger])
        champion = challenger if wins else "".join(present) or "none"
        outcome = "Promoted" if wins else "Not promoted"
        verdict = f"{outcome}: {why}. Champion version of {config.name}: {champion}."
        print(textwrap.fill(verdict, 80))
        if run:
            run.log_params(config)
            run.describe(verdict)
            run.set_tags({} if wins else {"failure": verdict})  # exit code 1 ends the run FAILED
    return 0 if wins else 1


def judge(runs: dict[str, FinishedRun]) -> tuple[bool, str]:
    """Judge a challenger, the first of two runs by name, by val; there may be no second one, the champion.

    It wins if it is better than the majority class, and than the champion: if the 95 % interval of the
    difference in balanced accuracy, by paired bootstrap over lesions, lies above 0.

    Returns:
        Whether it wins, and the numbers, or what else decided.
    """
    name, *others = runs
    if runs[name].leaks:
        return False, f"the split of {name} leaks"
    tables = {key: run.predictions.sort_values("image_id", ignore_index=True) for key, run in runs.items()}
    first, *_, last = [table[["image_id", "dx"]] for table in (tables[name], *tables.values())]
    if not first.equals(last):
        return False, f"{' and '.join(runs)} were measured on different val images; train both on one split"
    always, baseline = predict_baseline(tables[name])
    lesions = join_lesions(tables[name]).to_numpy(str)
    order = {always: [baseline], **{key: [read_predictions(tables[key])] for key in (*others, name)}}
    differences = compare_models(order, lesions)[1].query("metric == 'balanced_accuracy' and first == @name")
    rows = list(differences.itertuples())  # that to the majority class first
    shown = next((row for row in rows if not is_better(row.low)), rows[-1])
    images = f"on {len(lesions)} val images of {len(set(lesions))} lesions"
    return is_better(shown.low), f"{images}, {format_difference(shown)}"
