"""Slurm: submit, requeue, status and doctor."""
