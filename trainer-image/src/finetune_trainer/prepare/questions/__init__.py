"""Puts test prompts as a user would put them to a model that is not tuned: behind examples, an
instruction, or retrieved passages (``questions``)."""
