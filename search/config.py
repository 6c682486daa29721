"""The search's own options; every training option is inherited from `TrainConfig`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError, hide_password
from skin_resnet.options import Text

# What a trial can be judged by, and which way is better.
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "val_balanced_accuracy": "maximize",
    "val_macro_auc": "maximize",
    "val_loss": "minimize",
    "gap": "minimize",
}
_IN_MEMORY = {"sqlite:///", "sqlite:///:memory:"}


class SearchConfig(TrainConfig):
    """Search for the recipe that does not overfit; training options apply to every trial."""

    n_trials: int = Field(
        30,
        ge=2,
        le=100_000,
        description="Total number of trials, including the two baselines, pruned and failed ones; a larger "
        "number continues a finished study.",
    )
    workers: int = Field(
        1, ge=1, le=256, description="Trials in parallel on this machine, one process each, one GPU each."
    )
    seeds: int = Field(
        3,
        ge=0,
        le=100,
        description="Number of seeds to retrain winner and baseline recipe with before the test; 0: no "
        "retraining.",
    )
    retrain: Text = Field(
        "none",
        description="Training options that change when winner and baseline recipe are retrained, so that "
        "trials can be cheaper: image_size=128,epochs=20,train_fraction=1.",
    )
    study_name: Text = Field(
        "auto",
        description="Name of the Optuna study; an existing one is resumed. auto: the name of the data.",
    )
    storage: Text = Field(
        "sqlite:///optuna.db",
        description="Optuna storage: sqlite:///FILE, or postgresql+psycopg://... for many machines.",
    )
    sampler: Literal["tpe", "gp", "random"] = Field(
        "tpe", description="Optuna sampler; gp does not learn from pruned trials."
    )
    pruner: Literal["halving", "median", "hyperband", "none"] = Field(
        "halving", description="Optuna pruner; the two baselines are never pruned."
    )
    objectives: str = Field(
        "val_loss",
        description="val_loss, val_balanced_accuracy, val_macro_auc or gap. Several, comma-separated, give a "
        "Pareto front without pruning; the first one chooses the winner.",
    )
    max_gap: float = Field(
        0.0, ge=0, le=1, description="Largest train-val gap in balanced accuracy of a winner; 0: no limit."
    )
    fix: Text = Field(
        "none",
        description="Hyperparameters to fix or narrow: optimizer=sgd,lr=0.001..0.1,augment=light|strong. "
        "Trials 0 and 1, the baselines, are not affected.",
    )
    heartbeat_s: int = Field(
        15,
        ge=1,
        le=3600,
        description="Seconds between a trial's heartbeats. A trial that misses four was killed and is run "
        "again, up to 3 times; the baselines without limit.",
    )

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        for name in self.objective_names:
            if name not in DIRECTIONS:
                raise UserError(f"objectives: {name!r} is none of {', '.join(DIRECTIONS)}")
        if len(set(self.objective_names)) < len(self.objective_names):
            raise UserError(f"objectives: {self.objectives!r} repeats an objective; name each one once")
        if self.devices != 1:
            raise UserError(f"devices: a search needs devices=1, not {self.devices}; use workers instead")
        if self.resume != "none":
            raise UserError(
                f"resume={self.resume} does not apply to a search; repeat the command with the same "
                "study_name"
            )
        # In memory, each process would have a study of its own.
        if not self.storage.startswith(("sqlite:///", "postgresql")) or self.storage in _IN_MEMORY:
            raise UserError(
                f"storage: {hide_password(self.storage)!r} is not supported; use sqlite:///FILE or "
                "postgresql+psycopg://..."
            )
        # The default does not count as a choice: `mlflow run` passes every option.
        if self.best_by not in {type(self).model_fields["best_by"].default, self.training.best_by}:
            raise UserError(
                f"best_by: {self.best_by!r} contradicts objectives={self.objectives}; leave it out, or use "
                f"objectives=val_{self.best_by}"
            )
        self.change_for_retraining(self.training)
        return self

    def change_for_retraining(self, recipe: TrainConfig) -> TrainConfig:
        """Return a recipe with the options that `retrain` changes.

        Raises:
            UserError: `retrain` names no training option, or a value it cannot have.
        """
        changes: dict[str, str] = {}
        for entry in [] if self.retrain == "none" else self.retrain.split(","):
            name, _, text = (piece.strip() for piece in entry.partition("="))
            if name not in TrainConfig.model_fields or not text:
                raise UserError(f"retrain: {entry!r} is not OPTION=VALUE of a training option")
            changes[name] = text
        try:
            return recipe.with_changes(**changes)
        except UserError as error:
            raise UserError(f"retrain: {error}") from None

    def to_params(self) -> dict[str, str]:
        """Return every field as text, without the storage's user and password: others can read the run."""
        return super().to_params() | {"storage": hide_password(self.storage)}

    @property
    def study(self) -> str:
        """The study's name."""
        return (Path(self.data).stem or "search") if self.study_name == "auto" else self.study_name

    @property
    def objective_names(self) -> tuple[str, ...]:
        """What trials are judged by, the most important one first."""
        return tuple(name.strip() for name in self.objectives.split(","))

    @property
    def training(self) -> TrainConfig:
        """The training options of trial 1; the first objective on val chooses the best epoch."""
        values: dict[str, Any] = {name: getattr(self, name) for name in TrainConfig.model_fields}
        values["register_as"] = "none"  # the winner is registered, no trial
        on_val = [name for name in self.objective_names if name != "gap"]
        if on_val:
            values["best_by"] = on_val[0].removeprefix("val_")
        return TrainConfig.model_validate(values)
