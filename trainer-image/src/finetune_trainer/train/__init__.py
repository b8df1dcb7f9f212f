"""One training process from top to bottom: ``worker`` takes its place, ``session`` builds what it
needs, ``loop`` trains, ``checkpoint`` commits, ``final`` measures."""
