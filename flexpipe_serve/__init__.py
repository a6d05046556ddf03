"""An LLM server on Ray Serve whose pipeline split is live."""

__version__ = "0.1.0"
