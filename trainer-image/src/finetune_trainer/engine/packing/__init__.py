"""A row of tokens: where its documents lie, its way to the device, what it attends to."""
