"""XandRouting: one OpenAI-compatible server in front of many models and several engines."""

__version__ = "0.1.0"
