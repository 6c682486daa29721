"""The model card: its facts are those of the training, and what is wrong with it is told first."""

import re
import shlex
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from skin_resnet.cli import parse_options
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS, Split, split_lesions
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.card import write_card
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES
from tests.conftest import make_table
from tests.test_assess import evaluate
from tests.test_leakage import audit, build_store, draw_pixels

RUN_ID, STORE = "0123456789abcdef" * 2, "sqlite:////runs/mlflow.db"


def build(table: pd.DataFrame, config: TrainConfig, split: Split | None = None) -> dict[str, Any]:
    """What `write_card` is given at the end of a training on a table's images, tested on all of them."""
    split = split or split_lesions(table, val_fraction=0.2, test_fraction=0.2, seed=0)
    sides = table.image_id.map(dict(split.to_frame().to_numpy()))
    data = PreparedData(
        table=table.assign(dx=table.dx.mask(sides == "test")),  # as it is hidden from a training
        split=split,
        store=build_store(table, draw_pixels(table)),
        leakage=audit(table, list(sides)),
        split_fingerprints={},
    )
    assessment = evaluate(table)
    checkpoint = {
        "config": config.model_dump(mode="json"), "classes": list(data.classes), "arch": config.arch,
        "class_counts": data.class_counts.tolist(), "calibration": assessment.calibration, "epoch": 7,
        "image_size": 64, "license": data.license, "run_id": RUN_ID,
    }  # fmt: skip
    return {"checkpoint": checkpoint, "data": data, "assessment": assessment, "uri": STORE, "split": "test"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The seven diagnoses, with fewer images of df, and ids as in HAM10000."""
    table = make_table(lesions_per_class=30)
    table = table[(table.dx != "df") | (table.lesion_id < "L_df_021")].reset_index(drop=True)
    codes = pd.factorize(table.lesion_id)[0]
    return table.assign(lesion_id=[f"HAM_{code:07}" for code in codes])


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return TrainConfig(
        data="/images/ham10000", image_size=64, lr=0.002, mixup=0.2, seed=3, resume="auto", register_as="x"
    )


@pytest.fixture(scope="module")
def facts(table: pd.DataFrame, config: TrainConfig) -> dict[str, Any]:
    return build(table, config)


@pytest.fixture(scope="module")
def card(facts: dict[str, Any]) -> str:
    return write_card(**facts)


def get_section(card: str, name: str) -> str:
    return card.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def read_rows(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_the_scores_are_those_of_the_evaluation(card: str, facts: dict[str, Any]) -> None:
    assessment: Assessment = facts["assessment"]
    results = get_section(card, "Results on test")
    for name in ("balanced_accuracy", "plain_balanced_accuracy", "accuracy", "macro_auc", "coverage"):
        row = assessment.get(name)
        assert f"{row.value:.3f} [{row.low:.2f}, {row.high:.2f}]" in results
    assert f"{assessment.get('balanced_accuracy').value:.3f}" in card.split("\n\n")[1]
    assert f"always {assessment.baseline_class}: 0.143" in card.split("\n\n")[1]
    assert f"{assessment.get('ece').value:.3f}" in results
    rows = read_rows(results)
    for each in assessment.per_class.itertuples():
        assert rows[each.dx][1] == f"{each.sensitivity:.3f}"
    assert f"{assessment.calibration['thresholds']['malignant_at_0.95']:.4f}" in results
    # Of a sex with enough images there is a score; of a lesion's own class with too few there is none.
    assert "sex: male" in rows
    assert re.search(r"Not shown: \d+ subgroups? with fewer than 30 images", results) or "dx: df" in rows


def test_the_images_of_each_split_and_class_are_counted(card: str, facts: dict, table: pd.DataFrame) -> None:
    rows = read_rows(get_section(card, "Data"))
    sides = facts["data"].split.to_frame().set_index("image_id").split[table.image_id].to_numpy()
    for dx in HAM10000_CLASSES:
        assert rows[dx] == [str(((table.dx == dx) & (sides == name)).sum()) for name in SPLITS]
    assert rows["all images"] == [str((sides == name).sum()) for name in SPLITS]
    assert rows["lesions"] == [str(table.lesion_id[sides == name].nunique()) for name in SPLITS]
    fewest = ((table.dx == "df") & (sides == "train")).sum()
    assert f"df has the fewest, {fewest}." in card


def test_the_command_repeats_the_training(card: str, config: TrainConfig) -> None:
    (command,) = re.findall("```sh\n(.*?)```", card, re.DOTALL)
    shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True)
    options = parse_options("train", shown.stdout.splitlines()[2:])
    # Neither whether it was resumed nor where it was registered makes the model what it is.
    assert options == config.with_changes(resume="none", register_as="none")
    assert shlex.split(command.replace("\\\n", ""))[:2] == ["skin-resnet", "train"]


def test_it_says_what_the_model_is_and_how_it_is_loaded(card: str) -> None:
    assert card.startswith("# Model card: resnet50 · ham10000 · 64 px · seed 3\n")
    for diagnosis in DIAGNOSES:
        assert f"{diagnosis.code} ({diagnosis.name})" in card
    assert "`model_version` 01234567-epoch7" in card
    (snippet,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    compile(snippet, "card", "exec")
    assert f'"{STORE}"' in snippet
    assert f"runs:/{RUN_ID}/model" in snippet
    assert "true one for 80% of" in card  # the coverage it was calibrated for
    assert "not a medical device" in get_section(card, "Limits")
    assert "10.1038" in get_section(card, "License") or "180161" in get_section(card, "License")
    assert "CC BY-NC 4.0" in card
    assert "{" not in card.replace('{"image": [image]}', "")
    assert max(len(line) for line in card.splitlines() if "|" in line) <= 110
    assert card.count("\n") <= 140


def test_nothing_is_wrong_with_a_clean_tested_training(card: str) -> None:
    assert "leaks" not in card
    assert "was not evaluated" not in card
    assert "synthetic" not in card
    assert "there are no thresholds" not in card
    assert "p_malignant" not in card
    assert "- No test image shares its lesion or pixels" in card


def test_a_leak_comes_before_the_scores(table: pd.DataFrame, config: TrainConfig, facts: dict) -> None:
    split = facts["data"].split
    (twin, *_), rest = table.image_id[table.lesion_id == table.lesion_id[0]], table.lesion_id[0]
    of_lesion = tuple(table.image_id[table.lesion_id == rest])
    assert len(of_lesion) == 3
    leaking = Split(
        train=tuple(sorted({*split.train, twin})),
        val=tuple(each for each in split.val if each != twin),
        test=tuple(sorted({*split.test, *of_lesion[1:]} - {twin})),
    )
    leaking = replace(leaking, train=tuple(each for each in leaking.train if each not in leaking.test))
    leaking = replace(leaking, val=tuple(each for each in leaking.val if each not in leaking.test))
    card = write_card(**build(table, config, leaking))
    assert card.split("\n\n")[1] == LEAK_BANNER
    assert re.search(r"of the test images.* share their lesion", card)


def test_a_missing_test_and_synthetic_images_are_told(facts: dict, config: TrainConfig) -> None:
    demo = config.with_changes(data="demo").model_dump(mode="json")
    checkpoint = {**facts["checkpoint"], "config": demo}
    card = write_card(**{**facts, "split": "val", "checkpoint": checkpoint})
    _, synthetic, missing, scores, *_ = card.split("\n\n")
    assert "synthetic" in synthetic
    assert "Test was not evaluated" in missing
    assert scores.startswith("Val balanced accuracy")
    assert get_section(card, "Results on val")


def test_of_other_classes_and_images_without_lesions_it_says_what_is_missing(config: TrainConfig) -> None:
    table = make_table(lesions_per_class=30, classes=("benign", "malignant"))
    table = table.assign(lesion_id=table.image_id)
    card = write_card(**build(table, config.with_changes(data="/images/clinic")))
    assert "into benign, malignant." in card
    assert "no `p_malignant`" in get_section(card, "Limits")
    assert "thresholds, chosen" not in card
    data = get_section(card, "Data")
    assert "by image" in data
    assert "no lesion ids" in data
    assert "lesions" not in read_rows(data)
    assert "HAM10000 dataset" not in card
    assert np.char.find(card, "unknown: that of the images' source") > 0


def test_a_split_that_was_given_is_not_called_ours(facts: dict, config: TrainConfig) -> None:
    given = config.with_changes(split="/splits/a.csv").model_dump(mode="json")
    card = write_card(**{**facts, "checkpoint": {**facts["checkpoint"], "config": given}})
    assert "stratified" not in get_section(card, "Data")
