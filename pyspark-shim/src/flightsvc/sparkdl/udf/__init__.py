"""The package ``sparkdl.udf``: models for pictures as functions of SQL."""
