"""Exported models: a `Scorer` and its facts as one file, ONNX or torch's exported program (.pt2)."""

import importlib.util
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from skin_resnet.errors import UserError
from skin_resnet.model.classifier import Classifier, Pixels, Scorer, build_classifier

_FACTS = "skin_resnet.json"  # the name of the metadata in both
_MOST_ONNX = 2_000_000_000  # bytes of weights; protobuf, its format, ends at 2 GiB
_NAMES: Any = {"output_names": ["probabilities", "unfamiliarity"], "dynamic_shapes": ({0: "N"},)}


def write_exported(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Export what scores images to a file, `.onnx` or `.pt2`, whole or not at all.

    Raises:
        UserError: It cannot be written, a package is missing, or it scores otherwise than the network.
    """
    if file.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))):
        raise UserError("ONNX needs more packages; run pip install onnx onnxruntime onnxscript")
    classifier = build_classifier(checkpoint, torch.device("cpu"))
    numbers = sum(each.numel() for network in classifier.networks for each in network.parameters())
    if file.suffix == ".onnx" and 4 * numbers > _MOST_ONNX:
        raise UserError(f"ONNX holds 2 GB, and these networks are {4 * numbers / 1e9:.1f} GB; use format=pt2")
    facts = json.dumps({**classifier.facts, "scores_of_noise": _score_noise(classifier).tolist()})
    scorer = Scorer(checkpoint).to(memory_format=torch.contiguous_format)  # or torch.export warns
    example = torch.zeros(2, *[classifier.facts["image_size"]] * 2, 3, dtype=torch.uint8)
    try:
        with TemporaryDirectory(prefix=".export-", dir=file.parent) as folder:
            exported = torch.export.export(scorer, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
            content, temporary = io.BytesIO(), Path(folder, file.name)
            if file.suffix == ".pt2":
                torch.export.save(exported, content, extra_files={_FACTS: facts})
            else:
                program: Any = torch.onnx.export(exported, dynamo=True, verbose=False, **_NAMES)
                program.model.metadata_props[_FACTS] = facts
                content.write(program.model_proto.SerializeToString())
            temporary.write_bytes(content.getbuffer())
            read_exported(temporary, tolerance=1e-5)
            temporary.replace(file)
    except OSError as error:
        raise UserError(f"cannot write output={file} ({error.strerror}); choose another file") from None


def read_exported(file: Path, tolerance: float = 1e-3) -> Classifier:
    """Read an exported model as a classifier, which runs on the CPU in fp32.

    Raises:
        UserError: There is no such file, it is damaged or not ours, or a package is missing.
    """
    try:
        if is_onnx := file.suffix == ".onnx":
            onnxruntime = importlib.import_module("onnxruntime")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()  # of itself, it ignores OMP_NUM_THREADS
            program = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            facts = json.loads(program.get_modelmeta().custom_metadata_map[_FACTS])
        else:
            with zipfile.ZipFile(file) as archive:  # torch checks no checksum, and prints what it cannot read
                assert archive.testzip() is None
                facts = json.loads(archive.read(f"archive/extra/{_FACTS}"))
            program = torch.export.load(file).module()

        @torch.inference_mode()
        def score(pixels: Pixels) -> Any:
            scores = program.run(None, {"pixels": pixels}) if is_onnx else program(torch.from_numpy(pixels))
            return tuple(np.asarray(each, np.float64) for each in scores)

        classifier = Classifier(facts=facts, score=score)
        np.testing.assert_allclose(_score_noise(classifier), facts["scores_of_noise"], tolerance, tolerance)
    except ImportError:
        raise UserError(f"{file} needs another package; run pip install onnxruntime") from None
    except Exception as error:  # a damaged or foreign file can raise any
        raise UserError(f"{file} is missing, damaged, or no model of `export`; export it again") from error
    return classifier


def _score_noise(classifier: Classifier) -> np.ndarray:
    """Return probabilities and unfamiliarity of three images of noise, (3, K + 1): damage shows in them."""
    size = classifier.facts["image_size"]
    noise = np.random.RandomState(0).randint(0, 256, (3, size, size, 3), np.uint8)  # never changes
    return np.column_stack(classifier.score(noise))
