"""The networks of ``keras.applications``, listed in ``applications.tsv``: building them with weights."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import import_keras
from flightsvc.export.keras import reason as reason_of

if TYPE_CHECKING:
    import keras

IMAGENET = "imagenet"
"""The value of ``weights`` for a network's own weights."""
_HOST = "https://storage.googleapis.com"  # from which Keras fetches weights
_REACH_SECONDS = 20


def build_network(name: str, file: str, weights: Path | None) -> keras.Model:
    """Return a network of Keras with the weights of a file.

    A file with the name of ImageNet's weights is loaded by Keras itself, which builds EfficientNet
    differently for them.
    """
    assert weights is not None
    keras = import_keras(name)
    build = getattr(keras.applications, name)
    if weights.name != file:
        model = build(weights=None)
        load_weights(name, model, weights)
        return model
    with _getting(keras, file, lambda *_, **__: str(weights)):
        try:
            return build(weights=IMAGENET)
        except Exception as error:  # h5py and Keras raise many types
            raise _wrong(name, weights, error) from error


def load_weights(name: str, model: keras.Model, file: Path) -> None:
    """Load the weights of all layers. Keras itself only warns of some layers that are missing in a file."""
    keras = import_keras(name)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(keras.ops.full(variable.shape, float("nan"), variable.dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_weights(file)
    except Exception as error:  # h5py and Keras raise many types
        raise _wrong(name, file, error) from error
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype) and keras.ops.any(keras.ops.isnan(variable)):
            raise _wrong(name, file, ValueError(f"it lacks {variable.path}"))


def _wrong(name: str, file: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(f"network {name}: {file} does not hold its weights: {reason_of(error)}")


def weights_file(name: str, file: str) -> Path:
    """Return the file of a network's own weights; Keras fetches it if needed, and prints its progress.

    Raises:
        NotFoundError: They cannot be fetched.
    """
    path = _weights_folder() / file
    if not path.is_file():
        _fetch(name, path)
    return path


def _fetch(name: str, file: Path) -> None:

    def missing(reason: str) -> NotFoundError:
        return NotFoundError(
            f"network {name}: its weights are not in Keras's cache and cannot be downloaded ({reason}); "
            f"put {file.name} into {file.parent}, or give a file by weights=<file>"
        )

    try:  # Keras has no timeout
        with contextlib.suppress(urllib.error.HTTPError):  # the host has answered
            urllib.request.urlopen(_HOST, timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise missing(f"{_HOST}: {getattr(error, 'reason', error)}") from None
    keras = import_keras(name)

    class Fetched(Exception):  # ends the construction of the network, which is not needed
        pass

    def fetched(get: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        try:
            get(*args, **kwargs, cache_dir=str(file.parent.parent))
        except Exception as error:  # Keras raises Exception
            raise missing(reason_of(error)) from error
        raise Fetched

    file.parent.mkdir(parents=True, exist_ok=True)
    with _getting(keras, file.name, fetched), contextlib.suppress(Fetched):
        getattr(keras.applications, name)(weights=IMAGENET)
    if not file.is_file():
        raise missing("Keras put it somewhere else")


@contextlib.contextmanager
def _getting(keras: Any, file: str, instead: Callable[..., str]) -> Iterator[None]:
    """Replace Keras's ``get_file`` for one file by a function that gets the original as first argument."""
    file_utils = keras.src.utils.file_utils
    old = file_utils.get_file

    def get_file(fname: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return instead(old, fname, *args, **kwargs) if fname == file else old(fname, *args, **kwargs)

    file_utils.get_file = get_file
    try:
        yield
    finally:
        file_utils.get_file = old


def _weights_folder() -> Path:
    """Return the folder of Keras for weights."""
    home = os.environ.get("KERAS_HOME")
    if not home:
        user = os.path.expanduser("~")
        home = os.path.join(user if os.access(user, os.W_OK) else "/tmp", ".keras")
    return Path(os.path.abspath(os.path.expanduser(home))) / "models"
