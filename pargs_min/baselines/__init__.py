"""Rivals that fine-tune the language model."""
