"""Stages that run graphs and models of Keras on pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from pyspark import keyword_only
from pyspark.ml.param import Param, TypeConverters

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
    param,
    to_choice,
    to_function,
)
from flightsvc.ml.stage import Asked, Made, Stage, as_vector
from flightsvc.ml.tensors import KerasStage
from flightsvc.model import Model
from flightsvc.request import same_name
from flightsvc.spark.loading import IMAGE_FIELDS
from flightsvc.spark.session import active_conf, is_case_sensitive, quoted
from flightsvc.spark.types import is_image

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql.types import DataType, StructField, StructType

_FIELDS = tuple(IMAGE_FIELDS)


class TFImageTransformer(Stage, HasInputCol, HasOutputCol, HasOutputMode):
    """Runs a graph of TensorFlow 1 on pictures.

    If the graph's input has a fixed height and width and any batch, the sidecar stretches pictures to that
    size (bilinear) and runs them in batches; the column may then also have files (binary) and paths (string).
    Otherwise each picture is run in its own size, as float32 ``[1, height, width, channels]``.

    Args:
        inputCol: The column that is read: Spark's image struct.
        outputCol: The column that is added.
        graph: A ``tf.Graph``, a ``GraphDef`` or a :class:`flightsvc.export.graph.TFInputGraph`.
        inputTensor: The graph's input, ``name:0``.
        outputTensor: The output, ``name:0``.
        channelOrder: The order of channels in the graph: ``RGB``, ``BGR`` or ``L`` (grey).
        outputMode: ``vector``: the output flattened, as a Vector. ``image``: the output, ``[1, height, width,
            channels]``, as an image struct, with colours in the order blue, green, red.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    channelOrder: Param[str] = param(
        "channelOrder",
        "the order of channels in the graph: RGB, BGR or L",
        to_choice("channelOrder", "RGB", "BGR", "L"),
    )
    graph: Param[Any] = param("graph", "a tf.Graph, a GraphDef or a TFInputGraph")
    inputTensor: Param[str] = param("inputTensor", "the graph's input", TypeConverters.toString)
    outputTensor: Param[str] = param("outputTensor", "the graph's output", TypeConverters.toString)

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
        """Return the order of channels in the graph."""
        return self.getOrDefault(self.channelOrder)

    def setChannelOrder(self, value: str) -> Self:
        """Set the order of channels in the graph: ``RGB``, ``BGR`` or ``L``."""
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
    """Runs a model of Keras on picture files, given by paths or URIs.

    The workers call ``imageLoader`` for each path. Without it they read the file, and the sidecar decodes it
    and stretches it (bilinear) to the size of the model's input: RGB from 0 to 255, or grey if the input has
    one channel. The column may then also have files (binary) or image structs.

    Args:
        inputCol: The column of paths.
        outputCol: The column that is added.
        modelFile: A file that Keras has saved, ``.keras`` or ``.h5``.
        model: Instead of ``modelFile``: a Keras model, or any model that :class:`TFTransformer` takes.
        imageLoader: A function of a path that returns the model's input for one picture, ``[height, width,
            channels]`` or with a leading dimension of 1. It is pickled for the workers and in a saved stage.
            A row for which it raises an error cannot be run.
        outputMode: ``vector``: the output flattened, as a Vector. ``image``: the output, ``[rows, height,
            width, channels]``, as image structs of float32; three channels are taken for RGB.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    imageLoader: Param[Any] = param(
        "imageLoader", "a function of a path that returns the array of one picture", to_function
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
        """Return the function that loads a picture; ``None``: worker and sidecar load it."""
        return self.getOrDefault(self.imageLoader) if self.isDefined(self.imageLoader) else None

    def setImageLoader(self, value: Callable[[str], Any]) -> Self:
        """Set the function that loads a picture."""
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
    """Return the preprocessing of whole pictures for a model's input: RGB or grey, 0 to 255.

    Raises:
        InvalidArgumentError: The input has no fixed size, or is not one of pictures.
    """
    shape = spec.shape or ()
    if len(shape) != 4 or -1 in shape[1:] or shape[3] not in (1, 3):
        raise InvalidArgumentError(
            f"model {model.name}: input {source!r} is {spec}; without an imageLoader it must be "
            "[rows, height, width, channels] of a known size with 1 or 3 channels"
        )
    return ImageInput(shape[1:3], fit="stretch", channels="RGB" if shape[3] == 3 else "L")


def _as_image(column: str, order: str) -> Callable[[Model, str], tuple[DataType, Callable[[Column], Column]]]:
    """Return a function for ``finish`` that makes pictures of an output; ``column`` has their origins."""
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
            if order == "RGB" and shape[3] == 3:  # an image struct has blue, green, red
                found = F.transform(found, lambda line: F.transform(line, F.reverse))
            return image.of_tensor(found, F.col(quoted(column)))

        return image.schema(), pictures

    return finish


def _field(schema: StructType, name: str) -> StructField | None:
    """Return the column of a name; ``None``: there is none or several, which a later check refuses."""
    sensitive = is_case_sensitive(active_conf())
    found = [field for field in schema.fields if same_name(field.name, name, sensitive)]
    return found[0] if len(found) == 1 else None
