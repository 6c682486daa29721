"""The search's own options; every training option comes with them from `TrainConfig`."""

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError

# What a trial can be judged by, and which way is better.
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "val_balanced_accuracy": "maximize",
    "val_macro_auc": "maximize",
    "val_loss": "minimize",
    "gap": "minimize",
}
_IN_MEMORY = {"sqlite:///", "sqlite:///:memory:"}


class SearchConfig(TrainConfig):
    """Search for the recipe that does not overfit; training options pass through to every trial."""

    n_trials: int = Field(
        30,
        ge=2,
        le=100_000,
        description="Trials in all, with the two baselines, pruned and failed ones; more continue a study.",
    )
    workers: int = Field(1, ge=1, le=256, description="Processes that train at the same time here.")
    seeds: int = Field(
        3,
        ge=0,
        le=100,
        description="Seeds to retrain winner and seed recipe with, before the test; 0: no test.",
    )
    study_name: str = Field("search", min_length=1, description="The same name continues the same study.")
    storage: str = Field(
        "sqlite:///optuna.db",
        min_length=1,
        description="Where the study is kept: sqlite:///FILE, or postgresql+psycopg://... for many machines.",
    )
    sampler: Literal["tpe", "gp", "random"] = Field(
        "tpe", description="Who chooses the next trial; gp learns nothing from pruned ones."
    )
    pruner: Literal["median", "hyperband", "halving", "none"] = Field(
        "median", description="Who stops trials that promise nothing, but never the baselines."
    )
    objectives: str = Field(
        "val_balanced_accuracy",
        description="What judges trials: val_balanced_accuracy, val_macro_auc, val_loss, gap; several, with "
        "commas, give a Pareto front, the first one the winner, and none is pruned.",
    )
    max_gap: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Largest generalization gap (balanced accuracy, train minus val) of a winner; 0: any.",
    )
    fix: str = Field(
        "none",
        min_length=1,
        description="Parts of the space fixed or narrowed: optimizer=sgd,lr=0.001..0.1,augment=light|strong; "
        "trials 0 and 1, the baselines, stay as they are.",
    )
    heartbeat_s: int = Field(
        15,
        ge=1,
        le=3600,
        description="Seconds between a trial's signs of life; one that misses four is run again.",
    )
    model_name: str = Field(
        "skin-resnet", min_length=1, description="The registered model whose champion the winner challenges."
    )

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        for name in self.objective_names:
            if name not in DIRECTIONS:
                raise UserError(f"objectives: must be of {', '.join(DIRECTIONS)}, but got {name!r}.")
        if len(set(self.objective_names)) < len(self.objective_names):
            raise UserError(f"objectives: must name each one once, but got {self.objectives!r}.")
        if self.devices != 1:
            raise UserError(f"devices: must be 1 in a search, but got {self.devices}; use workers.")
        if self.resume != "none":
            raise UserError(
                f"resume: must be none in a search, but got {self.resume!r}; a search given again with the "
                "same study_name goes on by itself."
            )
        # In memory, each process would have a study of its own.
        if not self.storage.startswith(("sqlite:///", "postgresql")) or self.storage in _IN_MEMORY:
            raise UserError(
                f"storage: must be sqlite:///FILE or postgresql+psycopg://..., but got {self.storage!r}."
            )
        # Its default is no wish: `mlflow run` gives every option.
        if self.best_by not in {type(self).model_fields["best_by"].default, self.training.best_by}:
            raise UserError(
                f"best_by: must be what objectives names first, but got {self.best_by!r}; leave it out, "
                f"or give objectives=val_{self.best_by}."
            )
        return self

    def to_params(self) -> dict[str, str]:
        """Give every field as text; a run that others can read shows no password."""
        return super().to_params() | {"storage": hide_password(self.storage)}

    @property
    def objective_names(self) -> tuple[str, ...]:
        """What trials are judged by, the most important one first."""
        return tuple(name.strip() for name in self.objectives.split(","))

    @property
    def training(self) -> TrainConfig:
        """The training options, as trial 1 has them; the first objective on val chooses the best epoch."""
        values: dict[str, Any] = {name: getattr(self, name) for name in TrainConfig.model_fields}
        on_val = [name for name in self.objective_names if name != "gap"]
        if on_val:
            values["best_by"] = on_val[0].removeprefix("val_")
        return TrainConfig.model_validate(values)


def hide_password(url: str) -> str:
    """Write a database's URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
