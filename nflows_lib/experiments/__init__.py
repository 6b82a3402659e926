"""What trains for minutes and leaves a record: runs, their trainer, checkpoints, records, sheets, ablations."""
