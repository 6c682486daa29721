"""The model card: what a model is for, what it was made of, how good it is, and how it is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS, join_lesions
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.page import (
    LEAK_BANNER,
    format_frame,
    format_remarks,
    format_results,
    format_summary,
)
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES
from skin_resnet.model.classifier import FAMILIAR, describe
from skin_resnet.options import write_command

CARD = "model_card.md"  # among a run's artifacts
# What precedes "Data" is also the description of the model in the registry.
_TEMPLATE = """\
# Model card: {title}

{summary}

Classifies dermoscopy images of skin lesions into {names}. It is the {arch} of epoch {epoch} of run \
`{run_id}`, for {image_size} x {image_size} pixels; its predictions name it as `model_version` {version}.

## Use

**Intended:** research and teaching, on images like those below, by people who can judge the answers. \
**Out of scope:** diagnosis, triage or treatment of patients; images that are not dermoscopy; other lesions.

```python
import mlflow
import pandas as pd

mlflow.set_tracking_uri("{uri}")
model = mlflow.pyfunc.load_model("runs:/{run_id}/model")
image = open("lesion.jpg", "rb").read()
print(model.predict(pd.DataFrame({{"image": [image]}})).iloc[0])
```

A row per image has the predicted class, the calibrated probability of each class, `set` (the classes that \
together hold the true one for {calibration[coverage]:.0%} of such images), and `refer`, why to ask a person:

- `unfamiliar`: the image is unlike the training images. Its `unfamiliarity`, a distance that is below 1 for \
{familiar:.0%} of the val images, is above 1. This finds images of something else, not difficult lesions.
- `uncertain`: `set` has several classes.

## Limits

- Research software, not a medical device. It puts every image into one of its {count} classes.{other}
- Classes with few training images are learned worst; {rarest} has the fewest, {fewest}.
- The scores are of images like those below. On those of other clinics, cameras or skin types, expect lower \
ones; measure them before you use it: `skin-resnet evaluate --model {run_id} --data FOLDER`.

## Data

{data}, license: {license}.

{counts}

Split {how}.

{remarks}

## Recipe

```sh
{command}
```

## Results on {evaluated}

{results}

## License

The code is under the Apache License 2.0. License of the images: {license}.{citation}
"""


def write_card(
    checkpoint: Mapping[str, Any], data: PreparedData, assessment: Assessment, split: str, uri: str
) -> str:
    """Write the model card of a training with its evaluation on test, or on val if test was not evaluated."""
    config, facts = TrainConfig.model_validate(checkpoint["config"]), describe(checkpoint)
    counts: dict[str, int] = dict(zip(facts["classes"], checkpoint["class_counts"], strict=True))
    names = {each.code: f"{each.code} ({each.name})" for each in DIAGNOSES}
    name, by = Path(config.data).stem, "lesion" if data.leakage.knows_lesions else "image"
    parts = {
        LEAK_BANNER: data.leakage.leaks,
        "**Trained on synthetic images: of no use on real ones.**": config.data == "demo",
        "**Test was not evaluated. Val chose the epoch: expect lower scores.**": split != "test",
        format_summary(assessment, split): True,
    }
    other = " They are not HAM10000's: there are no thresholds for melanoma, and no `p_malignant`."
    cite = (
        "\n\nCite Tschandl, Rosendahl, Kittler, Scientific Data 5:180161 (2018), doi 10.1038/sdata.2018.161."
    )
    values = {
        "title": f"{config.arch} · {name} · {facts['image_size']} px · seed {config.seed}", "uri": uri,
        "summary": "\n\n".join(part for part, applies in parts.items() if applies), "count": len(counts),
        "names": ", ".join(names.get(code, code) for code in counts), "familiar": FAMILIAR, "data": name,
        "other": other * (tuple(counts) != HAM10000_CLASSES), "rarest": min(counts, key=counts.__getitem__),
        "how": f"by {by}, stratified by class" if config.split == "own" else "by a given table",
        "counts": _count_images(data), "remarks": format_remarks(data.leakage), "evaluated": split,
        "command": write_command(config), "results": format_results(assessment, split),
        "fewest": min(counts.values()), "citation": cite * ("HAM10000" in facts["license"]),
    }  # fmt: skip
    return _TEMPLATE.format_map({**checkpoint, **facts, **values})


def _count_images(data: PreparedData) -> str:
    """Write a table of each split's images, by class, and lesions."""
    counts = data.leakage.class_counts.rename(index=str)
    counts.loc["all images"] = counts.sum()
    if data.leakage.knows_lesions:
        lesions, ids = join_lesions(data.table), data.table.image_id
        counts.loc["lesions"] = [lesions[ids.isin(getattr(data.split, name))].nunique() for name in SPLITS]
    return format_frame(counts.rename_axis("dx").reset_index())
