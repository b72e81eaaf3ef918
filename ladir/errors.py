"""Errors a user can act on: their message says what is wrong, where, and the remedy, so no traceback is needed."""

from __future__ import annotations


class UnusableError(ValueError):
    """What a setting names (data, a model, a tokenizer, a folder, a control) is missing, torn, or of the wrong kind."""
