"""`unfreeze-sched distill`: the training run around the reference, a plain loop; its own extras load on use alone."""
