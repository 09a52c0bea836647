"""A first model in SQL: a Keras network of one neuron that converts Celsius to Fahrenheit.

spark-submit --master spark://HOST:7077 --properties-file flightsvc.conf examples/first_sql.py
"""

from __future__ import annotations

import keras
import numpy as np
from pyspark.sql import SparkSession

import flightsvc

spark = SparkSession.builder.appName("first SQL").getOrCreate()
network = keras.Sequential([keras.Input((1,), name="celsius"), keras.layers.Dense(1)])
network.layers[-1].set_weights([np.array([[1.8]]), np.array([32.0])])

flightsvc.register_udf(spark, "fahrenheit", flightsvc.Model(network))
spark.sql("SELECT c, fahrenheit(array(c))[0] AS f FROM VALUES (-40.0), (0.0), (37.0) AS t(c)").show()
