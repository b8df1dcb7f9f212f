"""Prepared data, as prepare writes it and the other stages read it."""
