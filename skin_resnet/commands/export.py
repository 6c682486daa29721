"""The command `export`: a trained model as one file that runs without this package."""

from pathlib import Path

from skin_resnet.commands.config import ExportConfig
from skin_resnet.errors import UserError, expand
from skin_resnet.evaluation.card import CARD
from skin_resnet.model.classifier import describe
from skin_resnet.model.export import write_exported
from skin_resnet.tracking.history import read_card
from skin_resnet.tracking.models import combine, read_models
from skin_resnet.tracking.run import open_project_run


def export(config: ExportConfig) -> None:
    """Export a model to a file, which is logged if `mlflow run` has opened a run.

    Raises:
        UserError: The model cannot be used, or the file cannot be written.
    """
    with open_project_run(f"export · {config.model}") as run:
        is_named = config.output != "auto"
        named = Path(config.output).suffix if is_named else ""
        suffix = f".{config.format}" if config.format != "auto" else named or ".onnx"
        if suffix not in {".onnx", ".pt2"} or (is_named and named != suffix):
            raise UserError(f"output={config.output} should end in .onnx or .pt2, and agree with format=")
        members = read_models(config.model)
        checkpoint = combine(members)
        file = expand(config.output if is_named else f"{describe(checkpoint)['version']}{suffix}")
        write_exported(checkpoint, file)
        print(f"exported {config.model} to {file} ({file.stat().st_size / 1e6:.0f} MB)")
        if card := "\n".join(filter(None, (read_card(each["run_id"]) for each in members))):
            file.with_suffix(".md").write_text(card, encoding="utf-8")
            print(f"its model card is {file.with_suffix('.md')}")
        if run:
            run.log_artifacts({file.name: file, **({CARD: card} if card else {})})
