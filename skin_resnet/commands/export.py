"""The command `export`: a trained model as one file that runs without this package."""

from contextlib import nullcontext

from skin_resnet.config import ExportConfig
from skin_resnet.errors import UserError, expand
from skin_resnet.model.classifier import describe
from skin_resnet.model.export import write_exported
from skin_resnet.tracking.models import combine, read_models
from skin_resnet.tracking.run import is_project_run, open_run
from skin_resnet.tracking.store import prepare_store


def export(config: ExportConfig) -> None:
    """Export a model to a file, which is logged if `mlflow run` has opened a run.

    Raises:
        UserError: The model cannot be used, or the file cannot be written.
    """
    with open_run(f"export · {config.model}") if is_project_run() else nullcontext() as run:
        prepare_store()
        checkpoint = combine(read_models(config.model))
        name = f"{describe(checkpoint)['version']}.{config.format}"
        file = expand(name if config.output == "auto" else config.output)
        if file.suffix != f".{config.format}":
            raise UserError(f"output should end in .{config.format}, not {config.output!r}")
        write_exported(checkpoint, file)
        print(f"exported {config.model} to {file} ({file.stat().st_size / 1e6:.0f} MB)")
        if run:
            run.log_artifacts({file.name: file})
