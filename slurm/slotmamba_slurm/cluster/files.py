"""The configuration files of a cluster on one machine.

Written for Slurm 22.05 (Debian 12). Nodes are several slurmds on this machine, each with its own port and loopback
address, so that nothing listens on the network.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

CLUSTER = "slotmamba"
PARTITIONS = ("normal", "preemptible")
CPUS, MEMORY_MIB, GPUS = 4, 4000, 2  # of each node, whatever the machine has (config_overrides)


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    port: int


def make_nodes(count: int) -> list[Node]:
    ports = free_ports(count)
    return [Node(f"node{number}", f"127.0.77.{number}", port) for number, port in enumerate(ports, start=1)]


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below those of outgoing connections and of jobs (`slotmamba_slurm.world`)."""
    found: set[int] = set()
    for port in secrets.SystemRandom().sample(range(10_000, 20_000), 2_000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.add(port)
        if len(found) == count:
            return sorted(found)
    raise OSError(f"there are no {count} free ports from 10000 to 19999")


def write_files(folder: Path, nodes: list[Node]) -> None:
    """Everything that the daemons read, in FOLDER/etc, and the folders that they write to."""
    for name in ("etc", "run", "log", "state", "db", "dbtmp", *(f"spool/{node.name}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    # munged wants every folder above its socket searchable by all.
    folder.chmod(0o711)
    controller_port, accounting_port = free_ports(2)
    etc = folder / "etc"
    (etc / "slurm.conf").write_text(_slurm_conf(folder, nodes, controller_port, accounting_port))
    _write_secret(etc / "slurmdbd.conf", _slurmdbd_conf(folder, accounting_port).encode())
    _write_secret(etc / "munge.key", secrets.token_bytes(1024))
    # Nothing here uses cgroups, but slurmd loads a plugin for them whatever slurm.conf says. That of v1 loads
    # anywhere; releases that know `disabled` want that.
    (etc / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if _version() >= (23, 2) else 'cgroup/v1'}\n")
    # slurmd wants character devices; without cgroups it guards nothing. With the flag it sets CUDA's variable alone.
    for gpu in range(GPUS):
        (folder / "run" / f"gpu{gpu}").symlink_to("/dev/null")
    (etc / "gres.conf").write_text(f"Name=gpu File={folder}/run/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n")
    known = Path("/etc/hosts").read_text()
    (etc / "hosts").write_text(known + "".join(f"{node.address} {node.name}\n" for node in nodes))


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def search_path() -> str:
    """PATH with the folders of daemons."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _version() -> tuple[int, int]:
    slurmd = shutil.which("slurmd", path=search_path())
    assert slurmd
    text = subprocess.run([slurmd, "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _slurm_conf(folder: Path, nodes: list[Node], controller_port: int, accounting_port: int) -> str:
    """Three kinds of settings: where things are, quick timers (a job starts in under a second, a requeued one in six,
    a dead node is noticed in twenty), and preemption of the partition `preemptible` by the partition `normal`."""
    socket_file = folder / "run" / "munge.sock"
    lines = [
        f"ClusterName={CLUSTER}",
        # The name has to be the machine's; the address keeps the controller off the network.
        f"SlurmctldHost={socket.gethostname().partition('.')[0]}(127.0.0.1)",
        f"SlurmctldPort={controller_port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={socket_file},cred_expire=5",  # also the delay of a requeue; less than 5 means 120
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/%n.pid",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SlurmdParameters=config_overrides",
        "DefMemPerCPU=500",
        "GresTypes=gpu",
        "JobRequeue=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000",
        "PriorityType=priority/basic",
        "ReturnToService=2",
        "KillWait=10",
        "SlurmdTimeout=10",
        "MessageTimeout=5",
        "TCPTimeout=2",
        "MinJobAge=3600",
        # Job ids that differ from cluster to cluster: files and ports made from them do not collide.
        f"FirstJobId={1_000 + secrets.randbelow(50_000)}",
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={accounting_port}",
        f"AccountingStoragePass={socket_file}",
        "JobAcctGatherType=jobacct_gather/linux",
        *(
            f"NodeName={node.name} NodeHostname={node.name} NodeAddr={node.address} Port={node.port} "
            f"CPUs={CPUS} RealMemory={MEMORY_MIB} Gres=gpu:{GPUS} State=UNKNOWN"
            for node in nodes
        ),
        "PartitionName=normal Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE",
        "PartitionName=preemptible Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE",
    ]
    return "\n".join(lines) + "\n"


def _slurmdbd_conf(folder: Path, port: int) -> str:
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/run/munge.sock",
        f"DbdHost={socket.gethostname().partition('.')[0]}",
        "DbdAddr=127.0.0.1",
        f"DbdPort={port}",
        "SlurmUser=root",
        f"PidFile={folder}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm_acct_db",
    ]
    return "\n".join(lines) + "\n"
