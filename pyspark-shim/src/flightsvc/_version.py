"""The version of the package, equal to the file VERSION of the repository."""

__version__ = "0.1.0"
