"""A real Slurm of several nodes on one machine, for tests and for trying things out.

python -m slotmamba_slurm.cluster up --nodes 3      starts it and prints what to set
python -m slotmamba_slurm.cluster down              ends what `up` started, and nothing else
"""

from slotmamba_slurm.cluster.cluster import ClusterError, SlurmCluster, missing_for_a_cluster

__all__ = ["ClusterError", "SlurmCluster", "missing_for_a_cluster"]
