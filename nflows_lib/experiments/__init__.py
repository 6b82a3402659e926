"""Experiments, which train for minutes and leave a record: the named runs, with their trainer, and the ablations."""
