"""The version of the library, kept apart so that any file may read it without an import circle."""

__version__ = "0.1.0"
