"""Stages for pictures: a graph on image structs, a model of Keras on files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from pyspark import keyword_only
from pyspark.ml.param import Param, Params, TypeConverters

from flightsvc import image
from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export.graph import as_graph
from flightsvc.export.pictures import picture_model
from flightsvc.mapping import ImageInput, Input, TensorSpec
from flightsvc.ml.params import (
    HasInputCol,
    HasOutputCol,
    HasOutputMode,
    first_set,
    to_choice,
    to_function,
)
from flightsvc.ml.stage import Asked, Made, Stage, as_vector
from flightsvc.ml.tensors import KerasStage
from flightsvc.model import Model
from flightsvc.request import same_name
from flightsvc.spark.session import active_conf, is_case_sensitive, quoted
from flightsvc.spark.types import is_image

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql.types import DataType, StructField, StructType

_FIELDS = ("height", "width", "nChannels", "mode", "data")


class TFImageTransformer(Stage, HasInputCol, HasOutputCol, HasOutputMode):
    """Runs a graph of TensorFlow 1 on pictures.

    Where the graph's input has a batch, a height and a width that are known, the sidecar stretches each
    picture to them (bilinear) and runs many at once; it then takes files (binary) and paths (string), too.
    Otherwise each picture is run in its own size, as float32 ``[1, height, width, channels]``.

    Args:
        inputCol: The column that is read: Spark's image struct.
        outputCol: The column that is added.
        graph: A ``tf.Graph``, a ``GraphDef`` or a :class:`flightsvc.export.graph.TFInputGraph`.
        inputTensor: The graph's input, ``name:0``.
        outputTensor: The output, ``name:0``.
        channelOrder: How the graph has colours: ``RGB``, ``BGR`` or ``L``, which is grey.
        outputMode: ``vector``: the output flattened, a Vector. ``image``: the output, ``[1, height, width,
            channels]``, as an image struct; its colours are blue, green, red again.
        batchSize: The most rows of one run.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    channelOrder: Param[str] = Param(
        Params._dummy(),
        "channelOrder",
        "how the graph has colours: RGB, BGR or L",
        typeConverter=to_choice("channelOrder", "RGB", "BGR", "L"),
    )
    graph: Param[Any] = Param(
        Params._dummy(),
        "graph",
        "a tf.Graph, a GraphDef or a TFInputGraph",
    )
    inputTensor: Param[str] = Param(
        Params._dummy(),
        "inputTensor",
        "the graph's input",
        typeConverter=TypeConverters.toString,
    )
    outputTensor: Param[str] = Param(
        Params._dummy(),
        "outputTensor",
        "the graph's output",
        typeConverter=TypeConverters.toString,
    )

    _sources = ("graph", "inputTensor", "outputTensor", "channelOrder", "outputMode")
    _beside = ("graph",)

    @keyword_only
    def __init__(
        self,
        *,
        channelOrder: str | None = None,
        inputCol: str | None = None,
        outputCol: str | None = None,
        graph: Any = None,
        inputTensor: str | None = None,
        outputTensor: str | None = None,
        outputMode: str | None = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self._setDefault(inputTensor="sparkdl_image_input:0", outputMode="vector")
        self.setParams(**self._input_kwargs)

    def getChannelOrder(self) -> str:
        """Return how the graph has colours."""
        return self.getOrDefault(self.channelOrder)

    def setChannelOrder(self, value: str) -> Self:
        """Set how the graph has colours: ``RGB``, ``BGR`` or ``L``."""
        return self._set(channelOrder=value)

    def getGraph(self) -> Any:
        """Return the graph."""
        return self.getOrDefault(self.graph)

    def setGraph(self, value: Any) -> Self:
        """Set the graph."""
        return self._set(graph=value)

    def getInputTensor(self) -> str:
        """Return the graph's input."""
        return self.getOrDefault(self.inputTensor)

    def setInputTensor(self, value: str) -> Self:
        """Set the graph's input."""
        return self._set(inputTensor=value)

    def getOutputTensor(self) -> str:
        """Return the graph's output."""
        return self.getOrDefault(self.outputTensor)

    def setOutputTensor(self, value: str) -> Self:
        """Set the graph's output."""
        return self._set(outputTensor=value)

    def _build(self) -> Model:
        for name in ("outputTensor", "channelOrder"):
            if not self.isDefined(name):
                raise InvalidArgumentError(f"{name} is not set")
        source, output, order = self.getInputTensor(), self.getOutputTensor(), self.getChannelOrder()
        graph = as_graph(first_set(self, ["graph"]), [source], [output])
        folder = graph.saved_model([source], [output])
        shape = Model(folder).inputs[source].shape or ()
        if len(shape) == 4 and shape[0] == -1 and -1 not in shape[1:]:
            size = ImageInput((shape[1], shape[2]), fit="stretch", channels=order)
            return Model(folder, preprocess={source: size})
        return Model(picture_model(graph, source, output, order, self.getOutputMode()))

    def _check(self, schema: StructType) -> None:
        field = _field(schema, self._column("inputCol"))
        if field is not None and not is_image(field.dataType) and not self._model().preprocess:
            raise InvalidArgumentError(
                f"column {field.name!r} is {field.dataType.simpleString()}; because the graph takes pictures "
                "of any size, the column must be Spark's image struct: use flightsvc.image.read_images, or "
                "flightsvc.image.decode of files"
            )

    def _asked(self) -> Asked:
        column, result, model = self._column("inputCol"), self.getOutputCol(), self._model()
        if model.preprocess:
            source, output = self.getInputTensor(), self.getOutputTensor()
            finish = (
                as_vector if self.getOutputMode() == "vector" else _as_image(column, self.getChannelOrder())
            )
            return Asked(model, {source: column}, {output: result}, {result: finish(model, output)})
        from pyspark.sql import functions as F

        def part(name: str) -> Callable[[], Column]:
            return lambda: F.col(quoted(column))[name]

        kinds = {name: kind.dataType for name, kind in zip(image.schema().names, image.schema(), strict=True)}
        inputs = {name: Made(kinds[name], part(name)) for name in _FIELDS}
        if self.getOutputMode() == "vector":
            kind, vector = as_vector(model, "vector")
            if "length" not in model.outputs:
                return Asked(model, inputs, {"vector": result}, {result: (kind, vector)})
            length = f"{self.uid}_length"

            def cut(found: Column) -> Column:
                return vector(F.slice(found, F.lit(1), F.col(length)))

            outputs = {"vector": result, "length": length}
            return Asked(model, inputs, outputs, {result: (kind, cut)}, frozenset([length]))
        parts = {name: f"{self.uid}_{name}" for name in _FIELDS[:-1]}

        def joined(found: Column) -> Column:
            fields = [F.col(part).alias(name) for name, part in parts.items()]
            origin = F.col(quoted(column))["origin"].alias("origin")
            return F.when(found.isNotNull(), F.struct(origin, *fields, found.alias("data")))

        outputs = {**parts, "data": result}
        hidden = frozenset(parts.values())
        return Asked(model, inputs, outputs, {result: (image.schema(), joined)}, hidden)


class KerasImageFileTransformer(KerasStage, HasOutputMode):
    """Runs a model of Keras on picture files, by their paths or URIs.

    With ``imageLoader`` the workers call it for each path. Without one they read the file, and the sidecar
    decodes it and stretches it (bilinear) to the size of the model's input: RGB, 0 to 255, or grey where the
    input has one channel. Binary columns of files and image structs are then taken, too.

    Args:
        inputCol: The column of paths.
        outputCol: The column that is added.
        modelFile: A file that Keras saved, ``.keras`` or ``.h5``.
        model: Instead of it a Keras model, or all that :class:`TFTransformer` takes.
        imageLoader: Takes a path, returns the array of one picture as the model wants it, ``[height, width,
            channels]`` or with a leading dimension of 1. It goes to the workers, and into the saved stage, as
            a pickle. A row for which it raises is one that cannot be run.
        outputMode: ``vector``: the output flattened, a Vector. ``image``: the output, ``[rows, height, width,
            channels]``, as image structs of float32; three channels are taken for RGB.
        batchSize: The most rows of one run.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    imageLoader: Param[Any] = Param(
        Params._dummy(),
        "imageLoader",
        "a function of a path that returns the array of one picture",
        typeConverter=to_function,
    )

    _functions = ("imageLoader",)

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelFile: str | None = None,
        model: Any = None,
        imageLoader: Callable[[str], Any] | None = None,
        outputMode: str | None = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self._setDefault(outputMode="vector")
        self.setParams(**self._input_kwargs)

    def getImageLoader(self) -> Callable[[str], Any] | None:
        """Return what loads a picture; ``None``: the worker and the sidecar do."""
        return self.getOrDefault(self.imageLoader) if self.isDefined(self.imageLoader) else None

    def setImageLoader(self, value: Callable[[str], Any]) -> Self:
        """Set what loads a picture."""
        return self._set(imageLoader=value)

    def _check(self, schema: StructType) -> None:
        from pyspark.sql.types import StringType

        field = _field(schema, self._column("inputCol"))
        if field is None or self.getImageLoader() is None or isinstance(field.dataType, StringType):
            return
        raise InvalidArgumentError(
            f"column {field.name!r} is {field.dataType.simpleString()}; imageLoader needs paths, "
            "a column of string"
        )

    def _asked(self) -> Asked:
        column, result, model = self._column("inputCol"), self.getOutputCol(), self._model()
        source, output = self._ends()
        loader = self.getImageLoader()
        entry = column if loader is None else Input(column, load=loader)
        if loader is None and not model.preprocess:
            model = model.replace(preprocess={source: _whole(model, source, model.inputs[source])})
        finish = as_vector if self.getOutputMode() == "vector" else _as_image(column, "RGB")
        return Asked(model, {source: entry}, {output: result}, {result: finish(model, output)})


def _whole(model: Model, source: str, spec: TensorSpec) -> ImageInput:
    """Return how pictures become a model's input: in RGB or grey, 0 to 255.

    Raises:
        InvalidArgumentError: The input has no size, or is none of pictures.
    """
    shape = spec.shape or ()
    if len(shape) != 4 or -1 in shape[1:] or shape[3] not in (1, 3):
        raise InvalidArgumentError(
            f"model {model.name}: input {source!r} is {spec}; without an imageLoader it must be "
            "[rows, height, width, channels] of a known size with 1 or 3 channels"
        )
    return ImageInput(shape[1:3], fit="stretch", channels="RGB" if shape[3] == 3 else "L")


def _as_image(column: str, order: str) -> Callable[[Model, str], tuple[DataType, Callable[[Column], Column]]]:
    """Return how an output becomes pictures, with the origin that ``column`` tells."""
    from pyspark.sql import functions as F

    def finish(model: Model, output: str) -> tuple[DataType, Callable[[Column], Column]]:
        if output not in model.outputs:
            raise NotFoundError(
                f"model {model.name}: there is no output {output!r}; outputs: {', '.join(model.outputs)}"
            )
        spec = model.outputs[output]
        shape = spec.shape or ()
        if len(shape) != 4 or shape[3] not in (1, 3, 4) or spec.dtype in ("string", "bool"):
            raise InvalidArgumentError(
                f"model {model.name}: output {output!r} is {spec}; a picture is [rows, height, width, "
                "channels] with 1, 3 or 4 channels; or use outputMode='vector'"
            )

        def pictures(found: Column) -> Column:
            if order == "RGB" and shape[3] == 3:  # in a struct they are blue, green, red
                found = F.transform(found, lambda line: F.transform(line, F.reverse))
            return image.of_tensor(found, F.col(quoted(column)))

        return image.schema(), pictures

    return finish


def _field(schema: StructType, name: str) -> StructField | None:
    """Return the column, if there is one alone; the model's own check says the rest."""
    sensitive = is_case_sensitive(active_conf())
    found = [field for field in schema.fields if same_name(field.name, name, sensitive)]
    return found[0] if len(found) == 1 else None
