"""What the tutorial's scripts rely on and a learner need not open.

Nothing here imports a script or reads a flag: functions take values.
"""
