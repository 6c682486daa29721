"""No lesion on two sides, every class on all three, and the same split whatever the order of the rows."""

import pandas as pd
import pytest

from skin_resnet.data.split import Split, drop_seen, join_lesions, split_lesions, thin_train
from skin_resnet.errors import UserError
from tests.conftest import make_table


def split(table: pd.DataFrame, seed: int = 0, fraction: float = 0.2) -> Split:
    return split_lesions(table, val_fraction=fraction, test_fraction=fraction, seed=seed)


def count_classes(table: pd.DataFrame, split: Split) -> pd.DataFrame:
    return table.merge(split.to_frame()).value_counts(["dx", "split"]).unstack(fill_value=0)


@pytest.mark.parametrize("seed", range(5))
def test_no_lesion_is_in_two_splits_and_no_image_is_lost(seed: int) -> None:
    table = make_table()
    sides = table.merge(split(table, seed).to_frame())
    assert len(sides) == len(table)
    assert sides.groupby("lesion_id").split.nunique().max() == 1


@pytest.mark.parametrize("lesions", [3, 4, 12])
def test_every_class_of_three_lesions_is_in_all_three(lesions: int) -> None:
    table = make_table(lesions_per_class=lesions)
    assert (count_classes(table, split(table, fraction=0.15)) > 0).all(axis=None)


def test_each_class_is_split_by_its_fraction_up_to_a_lesion() -> None:
    table = make_table(lesions_per_class=60)
    counts = count_classes(table, split(table, fraction=0.2))
    shares = counts.div(counts.sum(axis=1), axis=0)
    # A lesion has up to 3 of a class's 100 images.
    assert (shares[["val", "test"]] - 0.2).abs().max(axis=None) <= 0.02


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does() -> None:
    table = make_table()
    assert split(table.sample(frac=1, random_state=1)) == split(table)
    assert split(table, seed=1) != split(table, seed=0)


def test_a_class_more_leaves_the_others_where_they_were() -> None:
    table = make_table()
    without = table[table.dx != "mel"]
    kept = split(table).to_frame().set_index("image_id").split
    alone = split(without).to_frame().set_index("image_id").split
    assert kept[alone.index].equals(alone)


def test_published_same_lesion_pairs_stay_together() -> None:
    table = make_table(lesions_per_class=20)
    # Give two images of different lesions the ids of a published pair; try many lesions and seeds.
    singles = table.index[table.lesion_id.map(table.lesion_id.value_counts()) == 1]
    for seed in range(20):
        one, other = singles[seed], singles[seed + 1]
        if table.dx[one] != table.dx[other]:
            continue
        renamed = table.copy()
        renamed.loc[[one, other], "image_id"] = ["ISIC_0033481", "ISIC_0033421"]
        sides = split(renamed, seed).to_frame().set_index("image_id").split
        assert sides["ISIC_0033481"] == sides["ISIC_0033421"]
        assert join_lesions(renamed)[one] == join_lesions(renamed)[other]


def test_the_hash_names_the_split() -> None:
    table = make_table()
    assert split(table).hash == split(table).hash == Split.from_frame(split(table).to_frame()).hash
    assert split(table).hash != split(table, seed=1).hash


def test_too_few_lesions_are_refused() -> None:
    table = make_table(lesions_per_class=1, classes=("a", "b"))
    with pytest.raises(UserError, match="2 lesions"):
        split(table)


def test_what_was_learned_from_is_dropped_with_the_lesions_other_images() -> None:
    table = make_table()
    whole = split(table)
    assert set(drop_seen(table, whole).image_id) == set(whole.test)
    # Hide all but one image of each train lesion from the split: its other images must still be dropped.
    first = tuple(table[table.image_id.isin(whole.train)].groupby("lesion_id").image_id.first())
    partial = Split(train=first, val=whole.val, test=whole.test)
    assert set(drop_seen(table, partial).image_id) == set(whole.test)


def test_a_share_of_train_keeps_every_class_and_whole_lesions_and_leaves_val_and_test_alone() -> None:
    table = make_table(lesions_per_class=40)
    whole = split(table)
    half, tenth = (thin_train(table, whole, fraction, 0) for fraction in (0.5, 0.1))
    for thinned, fraction in ((half, 0.5), (tenth, 0.1)):
        assert (thinned.val, thinned.test) == (whole.val, whole.test)
        lesions = table[table.image_id.isin(thinned.train)].groupby("dx", observed=False).lesion_id.nunique()
        of_all = table[table.image_id.isin(whole.train)].groupby("dx", observed=False).lesion_id.nunique()
        assert ((lesions - fraction * of_all).abs() <= 0.5).all()
        kept = set(table.lesion_id[table.image_id.isin(thinned.train)])
        assert set(thinned.train) == set(whole.train) & set(table.image_id[table.lesion_id.isin(kept)])
    assert set(tenth.train) < set(half.train)
