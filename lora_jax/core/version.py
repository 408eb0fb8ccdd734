"""The version of the library, which runs are saved with."""

__version__ = "0.1.0"
