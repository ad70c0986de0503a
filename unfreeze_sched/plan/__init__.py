"""`unfreeze-sched plan`: what a schedule will do, phase by phase, before anything is trained.

It imports the schedule, the model's blocks to measure them, and the history's chart; nothing of the package imports it
but the command line.
"""
