"""What a user reads back: status, conditions and events. Pure."""
