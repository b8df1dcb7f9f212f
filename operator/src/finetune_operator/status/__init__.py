"""What a user reads back: status, its conditions, and events. Pure.

``status`` has one function for each state of a run; the other modules fill parts of its result.
"""
