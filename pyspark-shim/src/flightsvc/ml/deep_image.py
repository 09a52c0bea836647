"""Stages that run networks by name: classes and features of pictures."""

from __future__ import annotations

import dataclasses
import json
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pyspark import keyword_only
from pyspark.ml.param import Param, TypeConverters

from flightsvc.errors import InvalidArgumentError
from flightsvc.ml.networks import (
    FEATURES,
    INPUT,
    POOLINGS,
    PROBABILITIES,
    network,
)
from flightsvc.ml.networks.applications import IMAGENET
from flightsvc.ml.networks.labels import Labels, labels_of
from flightsvc.ml.params import HasInputCol, HasOutputCol, param, to_choice, to_positive
from flightsvc.ml.stage import Asked, Stage, as_vector
from flightsvc.model import Model

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql.types import DataType

_HINTS: dict[str, dict[str, Any]] = {
    "SCALE_AREA_AVERAGING": {"resize": "area"},
    "SCALE_DEFAULT": {"resize": "bilinear"},
    "SCALE_FAST": {"resize": "nearest"},
    "SCALE_REPLICATE": {"resize": "nearest"},
    "SCALE_SMOOTH": {"resize": "bilinear", "antialias": True},
}
"""How the sidecar resizes pictures for each hint; the names are from java.awt."""


def _path(value: Any) -> str:
    return str(os.fspath(value))


class _Named(Stage, HasInputCol, HasOutputCol):
    """The base of stages that run a network by name on a column of pictures.

    A saved stage includes the network, its labels and its preprocessing, so it loads without the name being
    registered.
    """

    modelName: Param[str] = param(
        "modelName", "the network; flightsvc.ml.networks.networks() lists them", TypeConverters.toString
    )
    weights: Param[str] = param(
        "weights", "imagenet: the network's own weights; or a file that Keras has saved", _path
    )

    _sources: ClassVar[tuple[str, ...]] = ("modelName", "weights")
    _beside: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(weights=IMAGENET)

    def getModelName(self) -> str:
        """Return the name of the network."""
        return self.getOrDefault(self.modelName)

    def setModelName(self, value: str) -> Self:
        """Set the name of the network, which must be known."""
        return self._set(modelName=value)

    def getWeights(self) -> str:
        """Return ``imagenet`` or the file of the weights."""
        return self.getOrDefault(self.weights)

    def setWeights(self, value: str | os.PathLike[str]) -> Self:
        """Set ``imagenet`` or a file of weights."""
        return self._set(weights=value)

    def _set(self, **params: Any) -> Self:
        # Not in the Param's converter, because a loaded stage need not know the network.
        if isinstance(params.get("modelName"), str):
            network(params["modelName"])
        return super()._set(**params)

    def _build(self) -> Model:
        if not self.isDefined(self.modelName):
            raise InvalidArgumentError("modelName is not set; give it a network: modelName='ResNet50'")
        it = network(self.getModelName())
        model = Model(self._export(), preprocess={INPUT: it.preprocess()})
        model.name = it.name
        return model

    @abstractmethod
    def _export(self) -> Path:
        """Return the SavedModel."""

    def _resizing(self, **how: Any) -> Model:
        """Return the model with other options for resizing pictures."""
        model = self._model()
        return model.replace(preprocess={INPUT: dataclasses.replace(model.preprocess[INPUT], **how)})


class DeepImagePredictor(_Named):
    """Classifies pictures by a network.

    Pictures are Spark's image structs, encoded files (binary) or paths (string). The sidecar stretches each
    to the network's size, bilinear as in ``tf.image.resize``. The result is a Vector of the probabilities of
    all classes; or, with ``decodePredictions``, the ``topK`` most probable classes in descending order, as
    ``array<struct<class:string,description:string,probability:float>>``.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The name of the network; :func:`flightsvc.ml.networks.networks` lists them.
        decodePredictions: Whether the most probable classes are named.
        topK: The number of named classes.
        weights: ``imagenet``: the network's own weights. Else a file that Keras has saved.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    decodePredictions: Param[bool] = param(
        "decodePredictions",
        "whether the most probable classes are named, or the probabilities of all returned as a Vector",
        TypeConverters.toBoolean,
    )
    topK: Param[int] = param("topK", "the number of named classes", to_positive("topK"))

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelName: str | None = None,
        decodePredictions: bool | None = None,
        topK: int | None = None,
        weights: str | os.PathLike[str] | None = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self._setDefault(decodePredictions=False, topK=5)
        self.setParams(**self._input_kwargs)

    def getDecodePredictions(self) -> bool:
        """Return whether the most probable classes are named."""
        return self.getOrDefault(self.decodePredictions)

    def setDecodePredictions(self, value: bool) -> Self:
        """Set whether the most probable classes are named."""
        return self._set(decodePredictions=value)

    def getTopK(self) -> int:
        """Return the number of named classes."""
        return self.getOrDefault(self.topK)

    def setTopK(self, value: int) -> Self:
        """Set the number of named classes."""
        return self._set(topK=value)

    def _export(self) -> Path:
        return network(self.getModelName()).classifier(self.getWeights())

    def _asked(self) -> Asked:
        model, output = self._model(), self.getOutputCol()
        finish = as_vector(model, PROBABILITIES)
        if self.getDecodePredictions():
            assert model.folder is not None
            labels, shape = labels_of(model.folder), model.outputs[PROBABILITIES].shape or ()
            if len(labels) != shape[-1]:
                raise InvalidArgumentError(
                    f"the network {model.name} has {len(labels) or 'no'} labels for {shape[-1]} classes; "
                    "register it with labels=, or leave decodePredictions off"
                )
            finish = _decoded(labels, self.getTopK())
        return Asked(model, {INPUT: self._column("inputCol")}, {PROBABILITIES: output}, {output: finish})


class DeepImageFeaturizer(_Named):
    """Computes features of pictures by a network without its last layers.

    Pictures are Spark's image structs, encoded files (binary) or paths (string). The sidecar stretches each
    to the network's size. The result is a Vector.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The name of the network; :func:`flightsvc.ml.networks.networks` lists them.
        scaleHint: The method of ``tf.image.resize``: ``SCALE_AREA_AVERAGING`` is area, ``SCALE_DEFAULT``
            bilinear, ``SCALE_FAST`` and ``SCALE_REPLICATE`` nearest, ``SCALE_SMOOTH`` bilinear with
            antialias.
        pooling: ``avg`` or ``max`` over height and width of the layer's map, or ``none``: the whole map, row
            by row, as in sparkdl.
        layer: Name of the layer whose output is taken. Default: the last one with a map larger than 1 x 1.
        weights: ``imagenet``: the network's own weights. Else a file that Keras has saved.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    scaleHint: Param[str] = param(
        "scaleHint", f"how pictures are resized: {', '.join(_HINTS)}", to_choice("scaleHint", *_HINTS)
    )
    pooling: Param[str] = param(
        "pooling",
        "avg or max over height and width of the layer's map, or none: the whole map",
        to_choice("pooling", *POOLINGS),
    )
    layer: Param[str] = param(
        "layer",
        "the layer whose output is taken; absent: the last one with a map larger than 1 x 1",
        TypeConverters.toString,
    )

    _sources = ("modelName", "weights", "pooling", "layer")

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelName: str | None = None,
        scaleHint: str | None = None,
        pooling: str | None = None,
        layer: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self._setDefault(scaleHint="SCALE_AREA_AVERAGING", pooling="avg")
        self.setParams(**self._input_kwargs)

    def getScaleHint(self) -> str:
        """Return how pictures are resized."""
        return self.getOrDefault(self.scaleHint)

    def setScaleHint(self, value: str) -> Self:
        """Set how pictures are resized."""
        return self._set(scaleHint=value)

    def getPooling(self) -> str:
        """Return how the layer's map is pooled."""
        return self.getOrDefault(self.pooling)

    def setPooling(self, value: str) -> Self:
        """Set how the layer's map is pooled: ``avg``, ``max`` or ``none``."""
        return self._set(pooling=value)

    def getLayer(self) -> str | None:
        """Return the layer whose output is taken; ``None``: the last one with a map."""
        return self.getOrDefault(self.layer) if self.isDefined(self.layer) else None

    def setLayer(self, value: str) -> Self:
        """Set the layer whose output is taken."""
        return self._set(layer=value)

    def _export(self) -> Path:
        it = network(self.getModelName())
        return it.featurizer(self.getLayer(), self.getPooling(), self.getWeights())

    def _asked(self) -> Asked:
        model, output = self._resizing(**_HINTS[self.getScaleHint()]), self.getOutputCol()
        finish = {output: as_vector(model, FEATURES)}
        return Asked(model, {INPUT: self._column("inputCol")}, {FEATURES: output}, finish)


def _decoded(labels: Labels, best: int) -> tuple[DataType, Callable[[Column], Column]]:
    """Return an entry of ``finish`` that names the most probable classes, by expressions of Spark."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import ArrayType, FloatType, StringType, StructType

    def decode(column: Column) -> Column:
        text = json.dumps([{"class": label, "description": name} for label, name in labels])
        table = F.from_json(F.lit(text), "array<struct<class:string,description:string>>")
        ranked = F.sort_array(
            F.transform(column, lambda p, i: F.struct(p.alias("probability"), i.alias("index"))), asc=False
        )

        def named(entry: Column) -> Column:
            label = F.element_at(table, entry["index"] + 1)
            return F.struct(label["class"], label["description"], entry["probability"])

        return F.transform(F.slice(ranked, 1, best), named)

    struct = StructType().add("class", StringType()).add("description", StringType())
    return ArrayType(struct.add("probability", FloatType())), decode
