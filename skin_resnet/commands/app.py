"""The command `app`: a page that classifies images with a trained model; programs can call it, too."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from skin_resnet.commands.config import AppConfig
from skin_resnet.data.tables import replace_nan
from skin_resnet.errors import UserError
from skin_resnet.evaluation.artifacts import explain_prediction
from skin_resnet.evaluation.plots.assessment import color_heat
from skin_resnet.labels import DIAGNOSES
from skin_resnet.model.classifier import Classifier
from skin_resnet.tracking.models import load_model

MAX_BODY, MAX_FILE = 64_000_000, 32_000_000  # bytes of a request, of a file
MAX_FILES, MAX_WAITING = 32, 16  # files of a request, requests

_USAGE = (
    f"send up to {MAX_FILES} images as files named files, as curl -F files=@lesion.jpg does, of at most "
    f"{MAX_FILE // 10**6} MB each and {MAX_BODY // 10**6} MB in all; explain is true or false"
)
_ERRORS = {
    403: "this server answers its own page, and calls to localhost; let a proxy pass on Host: localhost",
    **dict.fromkeys((404, 405), "there is no such page; ask for GET /, GET /health or POST /predict"),
    413: f"a file has at most {MAX_FILE // 10**6} MB, a request {MAX_BODY // 10**6} MB; send less at a time",
    500: "the server failed, and has printed why",
    503: "too many requests are waiting; try again in a few seconds",
}


def app(config: AppConfig) -> None:
    """Serve a model until interrupted; a model or an address that cannot be had is a UserError."""
    try:
        listener = socket.create_server((config.host, config.port))
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", error)).partition(" (while")[0]
        where = f"{config.host}:{config.port}"
        raise UserError(f"cannot use {where} ({reason}); choose another host or port") from None
    with listener:
        classifier = load_model(config.model, config.device, config.precision)
        address, port = listener.getsockname()
        names = {config.host, "localhost", address} if address.startswith("127.") else set()
        print(f"model {classifier.facts['version']}: {', '.join(classifier.classes)}")
        print(f"running on http://{config.host}:{port}, until Ctrl-C", flush=True)
        logging.getLogger("python_multipart").setLevel("CRITICAL")  # what is wrong with a form is answered
        options: Any = {"log_config": None, "log_level": "critical", "access_log": False, "lifespan": "off"}
        options |= {"http": _Protocol, "ws": "none", "timeout_graceful_shutdown": 3}
        uvicorn.Server(uvicorn.Config(build_api(classifier, names), **options)).run(sockets=[listener])


class _Protocol(H11Protocol):
    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too long a header; to close before it has arrived would cut off."""
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        self.transport.write((head + json.dumps({"error": _USAGE})).encode())
        with contextlib.suppress(OSError):  # the client may be gone
            self.transport.write_eof()
        self.data_received = lambda data: None  # type: ignore[method-assign]
        self.loop.call_later(1, self.transport.close)


def build_api(classifier: Classifier, names: set[str]) -> FastAPI:
    """Build the server of the page, `/health` and `/predict`; it answers by these names only, if any."""
    handlers: Any = dict.fromkeys((*_ERRORS, 400, 413, 422, RequestValidationError), _answer_error)
    limits: Any = {"max_files": MAX_FILES, "max_fields": MAX_FILES}
    api = FastAPI(openapi_url=None, redirect_slashes=False, form_limits=limits, exception_handlers=handlers)
    own_host = re.compile(f"({'|'.join(map(re.escape, names)) or '.*'})(:[0-9]+)?", re.IGNORECASE)
    full_names = {each.code: each.name for each in DIAGNOSES}
    facts = {**classifier.facts, "classes": {code: full_names.get(code, code) for code in classifier.classes}}
    places, turn = asyncio.Semaphore(1 + MAX_WAITING), asyncio.Lock()
    api.get("/")(lambda: FileResponse(Path(__file__).with_suffix(".html")))
    api.get("/health")(lambda: facts)

    @api.middleware("http")
    async def guard(request: Request, proceed: Any) -> Any:
        headers = request.headers
        # Another site's page may give its own name our address (DNS rebinding), or send us its form.
        is_form = request.method == "POST" and headers.get("sec-fetch-site") in {"cross-site", "same-site"}
        is_foreign = is_form or not own_host.fullmatch(headers.get("host", ""))
        code = 403 if is_foreign else 413 if int(headers.get("content-length", 0)) > MAX_BODY else 0
        return JSONResponse({"error": _ERRORS.get(code, _USAGE)}, code) if code else await proceed(request)

    @api.post("/predict", max_body_size=MAX_BODY)
    async def predict(files: list[UploadFile], explain: bool = False) -> JSONResponse:
        if max(each.size or 0 for each in files) > MAX_FILE:
            raise HTTPException(413)
        if places.locked():
            raise HTTPException(503, headers={"Retry-After": "5"})
        async with places, turn:
            rows = await asyncio.to_thread(_classify, classifier, files, explain)
        if all(row["error"] for row in rows):
            raise HTTPException(422, "; ".join(f"cannot read {row['file']}: {row['error']}" for row in rows))
        return JSONResponse(rows)

    return api


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 422 if isinstance(error, RequestValidationError) else 500)
    if status == 500:
        logging.getLogger(__name__).error("a request failed", exc_info=error)
    text = getattr(error, "detail", _USAGE) if status == 422 else _ERRORS.get(status, _USAGE)
    return JSONResponse({"error": text}, status, getattr(error, "headers", None))


def _classify(classifier: Classifier, files: list[UploadFile], explain: bool) -> list[dict[str, Any]]:
    """Return the rows of uploaded images, if wanted with a PNG to lay over them: what supports the class."""
    rows = []
    for file in files:  # one at a time, for the largest takes 1 GB while it is decoded
        [(table, [pixels])] = classifier.predict_batches([file.file.read()])
        [row] = replace_nan(table).to_dict("records")
        heat = None
        if explain and not isinstance(pixels, str):
            heat = explain_prediction(classifier, pixels, row["prediction"])
        if heat is not None:
            Image.fromarray(color_heat(heat)).save(png := io.BytesIO(), "PNG")
            row["overlay"] = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        name = re.split(r"[\\/]", file.filename or "")[-1][-200:].encode(errors="replace").decode()
        rows.append({"file": name, **row})
    return rows
