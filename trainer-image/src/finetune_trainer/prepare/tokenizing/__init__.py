"""Tokenizing: turns examples into samples: token ids and supervised spans; shortens long ones."""
