"""SavedModels made on the driver, of Keras models and graphs: what imports TensorFlow lies here."""
