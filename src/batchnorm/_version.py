"""The version, once: pyproject.toml reads it here, and so does whatever writes it down."""

__version__ = "0.2.0"
