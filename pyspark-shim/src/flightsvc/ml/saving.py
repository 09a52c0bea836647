"""Saving and loading stages: their Params, as Spark ML writes them, and their model.

``metadata`` is one line of JSON. ``model`` is Parquet with a row for each chunk of the model's archive. A
task writes it from the archive that Spark has distributed. Everything is written and read by DataFrames, so
any file system of Spark can be used, also on Connect.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark import cloudpickle
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter
from pyspark.sql.utils import is_remote

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.mapping import ImageInput
from flightsvc.model import Model
from flightsvc.server import archive, shipping

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from flightsvc.ml.stage import Stage

_mutex = threading.Lock()  # held while an archive is unpacked


class StageWriter(MLWriter):
    """Writes a stage and its model to a folder; ``overwrite()`` replaces an existing one."""

    def __init__(self, stage: Stage):
        super().__init__()
        self._stage = stage

    def saveImpl(self, path: str) -> None:
        """Write the stage to the folder ``path``.

        Raises:
            InvalidArgumentError: A Param is missing, or a function cannot be pickled.
            NotFoundError: There is no such model.
        """
        stage, session = self._stage, self.sparkSession
        with stage._named():
            model = stage._model()
            saved: dict[str, Any] = {
                "name": model.name,
                "signature": model.signature,
                "preprocess": {n: dataclasses.asdict(image) for n, image in model.preprocess.items()},
            }
            if model.folder is None:
                saved |= {"reference": model.reference, "version": model.version}
            else:
                saved["digest"] = shipping.add(session, shipping.version_folder(model.folder, model.version))
            functions = {
                name: _pickled(name, stage.getOrDefault(name))
                for name in stage._functions
                if stage.isDefined(name) and stage.getOrDefault(name) is not None
            }
            left_out = {*stage._beside, *stage._functions}
            params = {p.name: v for p, v in stage._paramMap.items() if p.name not in left_out}
            text = DefaultParamsWriter._get_metadata_to_save(
                stage, session, {"model": saved, "functions": functions}, params
            )
            session.createDataFrame([(text,)], "value string").coalesce(1).write.text(f"{path}/metadata")
            if "digest" in saved:
                chunks = shipping.Chunks(saved["digest"])
                rows = session.range(1).mapInArrow(chunks, "index bigint, piece binary")
                rows.write.parquet(f"{path}/model")

    def _handleOverwrite(self, path: str) -> None:
        if is_remote():
            from pyspark.ml.connect.readwrite import RemoteMLWriter

            RemoteMLWriter.handleOverwrite(path, True)
        else:
            super()._handleOverwrite(path)


class StageReader(MLReader["Stage"]):
    """Reads a stage that :class:`StageWriter` has written."""

    def load(self, path: str) -> Stage:
        """Return the stage in the folder ``path``, without needing TensorFlow.

        Its model is unpacked into a folder that is removed when this process ends.

        Raises:
            InvalidArgumentError: The saved model is damaged, or a function cannot be unpickled.
        """
        import importlib

        session = self.sparkSession
        metadata = json.loads(session.read.text(f"{path}/metadata").collect()[0][0])
        module, _, name = metadata["class"].rpartition(".")
        stage: Stage = getattr(importlib.import_module(module), name)()
        stage._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(stage, metadata)
        for name, text in metadata["functions"].items():
            stage._set(**{name: _unpickled(stage, name, text)})
        saved = metadata["model"]
        with stage._named():
            at = saved.get("reference") or _unpacked(session, f"{path}/model", saved["digest"])
        model = Model(
            at,
            signature=saved["signature"],
            version=saved.get("version", "latest"),
            preprocess={name: ImageInput(**fields) for name, fields in saved["preprocess"].items()},
        )
        model.name = saved["name"]
        stage._hold(model)
        return stage


def _unpacked(session: SparkSession, path: str, digest: str) -> Path:
    """Return the folder of a saved model, which is unpacked once in this process.

    Raises:
        InvalidArgumentError: A chunk is missing, or the content does not match the digest.
    """
    folder = shipping.private_folder() / f"saved-{digest.removeprefix('sha256:')}"
    with _mutex:
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=shipping.private_folder()) as place:
            whole, part = Path(place, "model.tar"), Path(place, "model")
            numbers = []
            with open(whole, "wb") as file:
                for row in session.read.parquet(path).toLocalIterator():
                    numbers.append(row["index"])
                    file.seek(row["index"] * archive.CHUNK_BYTES)
                    file.write(row["piece"])
            found = "nothing"
            if sorted(numbers) == list(range(len(numbers))):
                try:
                    with tarfile.open(whole) as tar:
                        tar.extractall(part, filter="data")
                    found = archive.digest(part)
                except (tarfile.TarError, EOFError, NotFoundError) as error:
                    found = f"no model ({error})"
            if found != digest:
                raise InvalidArgumentError(
                    f"the model saved in {path} is damaged: {len(numbers)} chunks make {found}, {digest} was "
                    "saved; save the stage again"
                )
            shutil.move(part, folder)
    return folder


def _pickled(name: str, function: Any) -> str:
    try:
        return base64.b64encode(cloudpickle.dumps(function)).decode()  # type: ignore[no-untyped-call]
    except Exception as error:  # the error of any object in the function
        raise InvalidArgumentError(f"{name} cannot be saved: it cannot be pickled: {error}") from error


def _unpickled(stage: Stage, name: str, text: str) -> Any:
    try:
        return cloudpickle.loads(base64.b64decode(text))
    except Exception as error:
        raise InvalidArgumentError(
            f"{stage.uid}: {name} cannot be loaded: {error}; modules that it imports must be installed"
        ) from error
