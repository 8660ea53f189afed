"""Code that the tutorial's scripts rely on, but that a learner need not read.

Nothing here imports a script. Functions take values; only `command_line` handles flags.
"""
