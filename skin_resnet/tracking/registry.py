"""The registry: registered models, which version is the champion, and their pages."""

import io
import shlex
from contextlib import redirect_stderr

import mlflow

from skin_resnet.errors import UserError
from skin_resnet.evaluation.card import CARD
from skin_resnet.evaluation.metrics import HEADLINES, is_better
from skin_resnet.evaluation.page import format_score
from skin_resnet.tracking.history import explain, find_model, read_card, read_scores
from skin_resnet.tracking.links import cut, link_run
from skin_resnet.tracking.store import has_store

# Aliases of a registered model: its best version, and the latest one that may be better.
CHAMPION, CHALLENGER = "champion", "challenger"
_SCORE = "balanced_accuracy"
_LONGEST = 4_900  # characters of a description: MLflow's databases keep 5,000


def register_run(run_id: str, name: str) -> str:
    """Register a finished training's model, and return what was done in a sentence.

    It becomes the champion if there is none and its split does not leak, else the challenger. A model that is
    not better than the majority class is not registered.

    Raises:
        UserError: The run has no model, or the registry does not take it.
    """
    with explain(f"run {run_id} cannot be registered as {name!r}"):
        client = mlflow.MlflowClient()
        run = client.get_run(run_id).data
        splits = ["test", "val"] if f"test_{_SCORE}" in run.metrics else ["val"]
        scores = {split: read_scores(run_id, split) for split in splits}
        for split, each in scores.items():
            value, low, high = each.loc[_SCORE]
            baseline = each.value[f"baseline_{_SCORE}"]
            if not is_better(low, baseline):
                score = f"{split} balanced accuracy {format_score(value, (low, high))}"
                always = f"the majority class, {format_score(baseline)}"
                return f"Not registered: {score} is not better than {always}."
        tags = {f"{split}/{key}": str(each.value[key]) for split, each in scores.items() for key in HEADLINES}
        tags["split.hash"] = run.tags["split.hash"]
        with redirect_stderr(io.StringIO()):  # on which MLflow prints what is returned below
            version = str(mlflow.register_model(find_model(run_id), name, tags=tags).version)
        client.update_model_version(name, version, _write_page(run_id, f"models:/{name}/{version}"))
        done = f"Registered: version {version}, models:/{name}@"
        if CHAMPION not in client.get_registered_model(name).aliases and run.tags["split.leaks"] == "false":
            make_champion(name, version, run_id)
            return f"{done}{CHAMPION}."
        client.set_registered_model_alias(name, CHALLENGER, version)
        return f"{done}{CHALLENGER}. Is it better? {shlex.join(['skin-resnet', 'promote', name])}"


def make_champion(name: str, version: str, run_id: str) -> None:
    """Make a version the champion, which the registered model's page then describes."""
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, CHAMPION, version)
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.update_registered_model(name, _write_page(run_id, f"models:/{name}@{CHAMPION}"))


def _write_page(run_id: str, uri: str) -> str:
    """Return the first screen of a run's model card, which loads the model by its URI in the registry."""
    card = read_card(run_id).partition("\n## Data\n")[0].replace(f"runs:/{run_id}/model", uri)
    text = f"From `{CARD}` of run {link_run(run_id)}:\n\n{card}" if card else f"Run {link_run(run_id)}."
    return cut(text, _LONGEST)


def find_contenders(name: str, challenger: str) -> dict[str, str]:
    """Return run ids by version: of the challenger (an alias or version), then of any champion.

    Raises:
        UserError: There is no such version, or it is the champion.
    """
    with explain(f"there is no version {challenger!r} of {name!r}"):
        if not has_store():
            raise LookupError("there is no such store")
        client = mlflow.MlflowClient()
        get = client.get_model_version if challenger.isdecimal() else client.get_model_version_by_alias
        found = [get(name, challenger)]
        if champion := client.get_registered_model(name).aliases.get(CHAMPION):
            found.append(client.get_model_version(name, str(champion)))
    if len({each.version for each in found}) < len(found):
        raise UserError(f"version {champion} of {name!r} is its champion; name another one with challenger=")
    return {str(each.version): str(each.run_id) for each in found}
