"""From examples to samples: token ids, what of them is learned, and what becomes of long ones."""
