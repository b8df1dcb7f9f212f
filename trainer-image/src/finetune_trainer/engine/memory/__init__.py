"""What a training takes of the memory and needs of the image, found before either is there."""
