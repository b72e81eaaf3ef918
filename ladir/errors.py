"""Errors a user can act on: their message says what is wrong, where, and the remedy, so no traceback is needed."""

from __future__ import annotations


class UnusableError(ValueError):
    """A model, tokenizer or folder that a setting names is missing, torn, or of the wrong kind."""
