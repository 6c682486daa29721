"""The registry: which model is the champion, and what its pages say."""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress

import mlflow

from skin_resnet.data.prepare import PreparedData
from skin_resnet.evaluation.metrics import is_better
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.tracking.links import link_run
from skin_resnet.tracking.store import describe_uri

CHAMPION = "champion"  # the alias of a registered model's best version
_SCORE = "balanced_accuracy"
_PAGE = """\
Classifies dermoscopy images of skin lesions into {classes}.

**{score}.** This is the score of the present {alias}, trained on {train} images of {data}, with \
{val} more in val and {test} in test. {leakage}

```python
import mlflow
import pandas as pd

mlflow.set_tracking_uri("{uri}")
model = mlflow.pyfunc.load_model("models:/{name}@{alias}")
image = open("lesion.jpg", "rb").read()
print(model.predict(pd.DataFrame({{"image": [image]}})))
```

It returns the predicted class and the calibrated probability of each class.

Limits:

- Research software, not a medical device. Do not use it for diagnosis or treatment.
- It knows only these {count} classes, and puts every image into one of them, whatever it shows.
- Its test images come from the same source as its training images. On images of other clinics, cameras or \
skin types, expect lower scores. Measure them before you use it: \
`skin-resnet evaluate --model models:/{name}@{alias} --data FOLDER`.
"""


def register_model(
    model_uri: str,
    name: str,
    *,
    metrics: Mapping[str, float],
    baseline: float,
    split_hash: str,
    descriptions: tuple[str, str],
) -> str:
    """Register a model; it becomes the champion if it beats the present one on val. Return what was done.

    A model that is not better than the majority class is not registered.

    Args:
        model_uri: From `log_model`.
        name: Of the registered model.
        metrics: Its `val/balanced_accuracy`, and `test/balanced_accuracy` if it was tested, with the low end
            of that one's interval as `test/balanced_accuracy_low`; tags of the version.
        baseline: The balanced accuracy of always predicting the majority class.
        split_hash: The split they were measured on: those of different splits cannot be compared.
        descriptions: Of the version, and of the registered model if this version becomes its champion.
    """
    split = "test" if f"test/{_SCORE}" in metrics else "val"
    score, val = metrics[f"{split}/{_SCORE}"], metrics[f"val/{_SCORE}"]
    low = metrics.get(f"{split}/{_SCORE}_low", score)
    if not is_better(low, baseline):
        interval = f" (95 % interval from {low:.3f} on)" if low < score else ""
        return (
            f"**Not registered: its balanced accuracy on {split}, {score:.3f}{interval}, is not better than "
            f"the majority class's, {baseline:.3f}.**"
        )
    tags = {**{key: repr(float(value)) for key, value in metrics.items()}, "split.hash": split_hash}
    with redirect_stderr(io.StringIO()):  # on which MLflow says what is returned below
        version = mlflow.register_model(model_uri, name, tags=tags).version
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, descriptions[0])
    done = f"Registered as {name}, version {version}"
    with suppress(mlflow.MlflowException):  # the first of its name
        champion = client.get_model_version_by_alias(name, CHAMPION)
        kept = f"{done}; version {champion.version} remains the {CHAMPION}"
        if champion.tags.get("split.hash") != split_hash:
            return f"{kept}: it was measured on another split."
        if val <= (present := float(champion.tags[f"val/{_SCORE}"])):
            return f"{kept}, with a val balanced accuracy of {present:.3f} to {val:.3f}."
    client.set_registered_model_alias(name, CHAMPION, version)
    client.update_registered_model(name, descriptions[1])
    return f"{done}, the {CHAMPION}: models:/{name}@{CHAMPION}."


def describe_version(score: str, command: str, run_id: str) -> str:
    """Return a version's description: score, the command with its recipe, and a link to its run."""
    return f"{score[0].upper()}{score[1:]}.\n\nTrained by `{command}` in run {link_run(run_id)}."


def describe_champion(name: str, score: str, data_name: str, data: PreparedData) -> str:
    """Return a registered model's description: score, data, how it is used, and its limits."""
    leakage = "No lesion is in two of these splits."
    if not data.leakage.knows_lesions:
        leakage = "The data has no lesion ids: the splits may share lesions, and the score may be too high."
    if data.leakage.leaks:
        leakage = LEAK_BANNER
    return _PAGE.format(
        name=name, alias=CHAMPION, uri=describe_uri(), score=f"{score[0].upper()}{score[1:]}", data=data_name,
        classes=", ".join(data.classes), count=len(data.classes), train=len(data.split.train),
        val=len(data.split.val), test=len(data.split.test), leakage=leakage,
    )  # fmt: skip
