"""Status, conditions and events, as a user reads them. Pure.

``status`` has one function per state of a run; the other modules fill parts of its result.
"""
