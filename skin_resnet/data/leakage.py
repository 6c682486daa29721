"""The leakage report: what the splits of a data set share, and how many test images that affects."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import chi2_contingency

from skin_resnet.data.extract import has_lesion_ids
from skin_resnet.data.split import SPLITS, Split, join_lesions
from skin_resnet.data.store import ImageStore
from skin_resnet.data.tables import replace_nan

# What two splits may share. All but the last prove a leak; a person has to look at the last.
KINDS = {
    "lesion": "the same lesion",
    "published": "one lesion, two ids",
    "duplicate": "the same pixels",
    "near": "near duplicate, to check",
}
LEAKING_KINDS = ("lesion", "published", "duplicate")

_NEAR_SIMILARITY = 0.98
_COMPARED_AT_ONCE = 16  # few, so that few other images may be like one of them
_PAIR_COLUMNS = ("kind", "image_id", "dx", "split", "seen_id", "seen_dx", "seen_split", "similarity")


@dataclass(frozen=True, kw_only=True, eq=False)
class LeakageReport:
    """Result of an audit.

    `pairs` has a row per two images that share something but are in different splits: kind, image_id, dx and
    split of one, seen_id, seen_dx and seen_split of the other, whose split comes earlier among train, val and
    test; similarity (1 is equal, NaN where it was not compared).
    """

    pairs: pd.DataFrame = field(repr=False)
    class_counts: pd.DataFrame  # images by class and split
    class_distance: dict[str, float]  # total variation distance of each split's class shares to train's
    class_p: float  # of the chi-square test that class and split are independent, over lesions
    lesions: int  # how many lesions the images show
    knows_lesions: bool  # whether the source says which images show one lesion; else "lesion" finds nothing
    unused: int  # images of the data set that are in no split
    unread: int  # images of the split (of the data, for split=own) that could not be read

    @property
    def leaks(self) -> bool:
        """Whether splits share what proves a leak; near duplicates alone do not."""
        return bool(self.pairs.kind.isin(LEAKING_KINDS).any())

    def count_touched(
        self, kinds: tuple[str, ...], split: str = "test", seen: tuple[str, ...] = ("train",)
    ) -> "pd.Series[int]":
        """Count a split's images, by class, that share something of these kinds with the `seen` splits."""
        pairs = self.pairs
        found = pairs[pairs.kind.isin(kinds) & (pairs.split == split) & pairs.seen_split.isin(seen)]
        counts = found.drop_duplicates("image_id").dx.value_counts()
        return counts.reindex(self.class_counts.index, fill_value=0)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; `test_touched` counts affected test images by kind and class."""
        kinds = {**{kind: (kind,) for kind in KINDS}, "any_leak": LEAKING_KINDS}
        return {
            "leaks": self.leaks,
            "images": self.class_counts.sum().to_dict(),
            "test_touched": {name: self.count_touched(some).to_dict() for name, some in kinds.items()},
            **vars(self),
            "class_counts": self.class_counts.to_dict(),
            "pairs": replace_nan(self.pairs).to_dict("records"),
        }


def audit_split(table: pd.DataFrame, split: Split, store: ImageStore) -> LeakageReport:
    """Find what images of different splits share.

    The kinds are: lesion, the lesion id; published, a lesion under two ids (see `join_lesions`); duplicate,
    every pixel; near, thumbnails of two lesions that correlate in one of eight orientations.

    The threshold of 0.98 was measured on HAM10000 at 150 px. Of 50,141,871 pairs of different lesions, 4
    reach it (138 reach 0.97, none 0.985). Of 800 images 99.9 % reach it when halved, blurred, brightened or
    saved with JPEG quality 20; 95 % when cropped by 2 % on each side, 22 % when by 5 %. It does not
    detect that two photos show one lesion: 4 % of such pairs reach it. A perceptual hash (64-bit pHash) did
    worse: at a distance of 2 it mistakes 161 pairs, and finds 40 % of the 2 % crops.

    `split` may leave out images of the table.
    """
    side = table.image_id.map(dict(split.to_frame().to_numpy()))
    used = np.flatnonzero(side.notna())
    rows = store.find_rows(tuple(table.image_id.iloc[used]))
    images = pd.DataFrame(
        {
            "image_id": table.image_id,
            "dx": table.dx.astype(str),
            "split": side,
            "order": side.map(SPLITS.index, na_action="ignore"),
            "lesion_id": table.lesion_id,
            "joined": join_lesions(table),
        }
    ).iloc[used]
    images = images.reset_index(drop=True).assign(digest=np.array(store.digests)[rows])
    counts = pd.crosstab(table.dx, side, dropna=False).reindex(table.dx.cat.categories, fill_value=0)
    counts = counts.reindex(columns=list(SPLITS), fill_value=0).astype(np.int64)
    shares = counts / counts.sum().clip(lower=1)
    distance = shares.sub(shares.train, axis=0).abs().sum() / 2
    lesions = images.drop_duplicates(["joined", "split"])
    observed = pd.crosstab(lesions.dx, lesions.split)
    return LeakageReport(
        pairs=_find_pairs(images, _normalize_thumbnails(store.thumbnails[rows])),
        class_counts=counts,
        class_distance={name: float(distance[name]) for name in SPLITS[1:] if counts[name].any()},
        class_p=float(chi2_contingency(observed, correction=False).pvalue),
        lesions=images.joined.nunique(),
        knows_lesions=has_lesion_ids(table),
        unused=len(table) - len(used),
        unread=sum(len(getattr(split, name)) for name in SPLITS) - len(used),
    )


def _normalize_thumbnails(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Shift and scale each thumbnail (n, 16, 16) to mean 0 and length 1."""
    shifted = thumbnails.astype(np.float32)
    shifted -= shifted.mean(axis=(1, 2), keepdims=True)
    # An image of one color becomes zeros, which correlate with nothing: two such are no sign of a leak.
    shifted /= np.linalg.norm(shifted, axis=(1, 2), keepdims=True).clip(min=1e-6)
    return shifted


def _find_pairs(images: pd.DataFrame, thumbnails: npt.NDArray[np.float32]) -> pd.DataFrame:
    found = [
        _match(images, "lesion_id").assign(kind="lesion"),
        _match(images, "joined").assign(kind="published"),
        _match(images, "digest").assign(kind="duplicate", similarity=1.0),
        _find_alike(images.order.to_numpy(), thumbnails).assign(kind="near"),
    ]
    pairs = pd.concat(found, ignore_index=True).join(images, on="row")
    pairs = pairs.join(images.add_prefix("seen_"), on="seen_row")
    # Images of one lesion are joined too, and often near duplicates: once is enough. Equal pixels count.
    is_one_lesion = (pairs.kind == "published") & (pairs.lesion_id == pairs.seen_lesion_id)
    is_known = (pairs.joined == pairs.seen_joined) | (pairs.digest == pairs.seen_digest)
    pairs = pairs[~is_one_lesion & ~((pairs.kind == "near") & is_known)]
    pairs["kind"] = pd.Categorical(pairs.kind, categories=list(KINDS), ordered=True)
    pairs = pairs.sort_values(
        ["kind", "similarity", "split", "image_id", "seen_image_id"],
        ascending=[True, False, True, True, True],
        ignore_index=True,
    )
    return pairs.rename(columns={"seen_image_id": "seen_id"})[list(_PAIR_COLUMNS)]


def _match(images: pd.DataFrame, key: str) -> pd.DataFrame:
    """Pair the rows of images in different splits that agree in a column."""
    shared = images[images.groupby(key).order.transform("nunique") > 1][[key, "order"]]
    shared = shared.rename_axis("row").reset_index()
    pairs = shared.merge(shared.add_prefix("seen_"), left_on=key, right_on=f"seen_{key}")
    pairs = pairs[pairs.order > pairs.seen_order]
    return pairs[["row", "seen_row"]].assign(similarity=np.nan)


def _find_alike(order: npt.NDArray[np.int64], thumbnails: npt.NDArray[np.float32]) -> pd.DataFrame:
    """Pair the rows of images in different splits that correlate in any of eight orientations."""
    some = np.array_split(thumbnails, len(thumbnails) // 4096 + 1)
    bounds = np.concatenate([_bound_similarity(_turn(each)) for each in some])
    later = np.flatnonzero(order > 0)
    found = []
    for block in np.array_split(later, len(later) // _COMPARED_AT_ONCE + 1):
        others = np.flatnonzero((bounds[block] @ bounds.T > _NEAR_SIMILARITY - 1e-4).any(axis=0))
        similarity = (_turn(thumbnails[block]) @ thumbnails[others].reshape(-1, 256).T).max(axis=0)
        one, other = np.nonzero((similarity >= _NEAR_SIMILARITY) & (order[block, None] > order[others]))
        similar = {"row": block[one], "seen_row": others[other], "similarity": similarity[one, other]}
        found.append(pd.DataFrame(similar))
    return pd.concat(found, ignore_index=True)


def _turn(thumbnails: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the eight orientations of thumbnails (n, 16, 16), as (8, n, 256)."""
    mirrored = (thumbnails, thumbnails[:, :, ::-1])
    turned = [np.rot90(one, turns, (1, 2)) for one in mirrored for turns in range(4)]
    return np.stack(turned).reshape(8, len(thumbnails), -1)


def _bound_similarity(turned: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return a unit vector (n, 68) for each image of (8, n, 256): products are at least the similarities.

    An image is the sum of orthogonal parts: one that no turn or reflection changes, three that these only
    negate, and a rest. How alike two images can be is the product of the first parts, of which a quarter says
    all, and of the lengths of the others. In HAM10000, 0.4 % of the pairs reach the threshold so.
    """
    signs = ((1,) * 8, (1,) * 4 + (-1,) * 4, (1, -1) * 4, (1, -1, 1, -1, -1, 1, -1, 1))
    first, *others = (np.tensordot(np.array(row, np.float32) / 8, turned, 1) for row in signs)
    corner = 2 * first.reshape(-1, 16, 16)[:, :8, :8].reshape(-1, 64)
    known = np.column_stack([corner, *(np.linalg.norm(part, axis=1) for part in others)])
    rest = np.sqrt((1 - np.square(known).sum(axis=1)).clip(min=0))
    return np.column_stack([known, rest])
