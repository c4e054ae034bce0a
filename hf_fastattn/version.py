"""The version, read by pyproject.toml, the command and `hf_fastattn.__version__`; right in a clone without installation."""

__version__ = "0.1.0"
