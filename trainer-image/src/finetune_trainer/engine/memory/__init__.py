"""Memory that a training needs, and its requirements on the image, found before training starts."""
