"""Slurm for SlotMamba: jobs from recipes (`submit`), the program of their tasks (`task`), a cluster to try them on."""
