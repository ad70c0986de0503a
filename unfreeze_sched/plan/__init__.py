"""`unfreeze-sched plan`: what a schedule will do, phase by phase, before anything is trained."""
