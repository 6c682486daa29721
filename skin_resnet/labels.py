"""The seven diagnoses of HAM10000: their names, their order, and which are malignant."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A diagnosis as HAM10000 codes it.

    Source: Tschandl, Rosendahl, Kittler, Scientific Data 5:180161 (2018), section "Diagnostic categories".
    """

    code: str
    name: str
    malignant: bool


# Alphabetical by code: a model's output columns follow this order, so it never changes.
# akiec (actinic keratosis, Bowen's disease) is a precursor of cancer and counts as malignant.
DIAGNOSES = (
    Diagnosis(code="akiec", name="actinic keratosis / Bowen's disease", malignant=True),
    Diagnosis(code="bcc", name="basal cell carcinoma", malignant=True),
    Diagnosis(code="bkl", name="benign keratosis", malignant=False),
    Diagnosis(code="df", name="dermatofibroma", malignant=False),
    Diagnosis(code="mel", name="melanoma", malignant=True),
    Diagnosis(code="nv", name="melanocytic nevus", malignant=False),
    Diagnosis(code="vasc", name="vascular lesion", malignant=False),
)

HAM10000_CLASSES = tuple(diagnosis.code for diagnosis in DIAGNOSES)


def order_classes(codes: set[str]) -> tuple[str, ...]:
    """Return the class order for a data set with these diagnosis codes.

    Any subset of the seven gets all seven, so that a model trained on HAM10000 keeps its head when a class is
    absent; other codes are sorted.
    """
    if codes <= set(HAM10000_CLASSES):
        return HAM10000_CLASSES
    return tuple(sorted(codes))
