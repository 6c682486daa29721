"""The class order: HAM10000's for any part of it, sorted for other data."""

from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES, order_classes


def test_the_order_is_that_of_the_codes() -> None:
    assert HAM10000_CLASSES == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def test_a_part_of_ham10000_keeps_all_seven() -> None:
    assert order_classes({"mel", "nv"}) == HAM10000_CLASSES


def test_other_classes_are_sorted() -> None:
    assert order_classes({"wart", "mel", "acne"}) == ("acne", "mel", "wart")


def test_melanoma_both_carcinomas_and_their_precursor_are_malignant() -> None:
    assert {diagnosis.code for diagnosis in DIAGNOSES if diagnosis.malignant} == {"mel", "bcc", "akiec"}
