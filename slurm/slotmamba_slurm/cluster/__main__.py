"""``python -m slotmamba_slurm.cluster up | down``."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slotmamba_slurm.cluster.cluster import ClusterError, SlurmCluster, missing_for_a_cluster

KEEPER = "keeper"  # in the cluster's folder: the process that holds all others, once they are up
START_SECONDS = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slotmamba_slurm.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a Slurm of several nodes on this machine and print what to set")
    up.add_argument("--nodes", type=int, default=2, choices=range(1, 33), metavar="N", help="default %(default)s")
    down = commands.add_parser("down", help="end what `up` started")
    conf = os.environ.get("SLURM_CONF")
    down.add_argument(
        "conf", metavar="SLURM_CONF", nargs="?", default=conf, help="as `up` printed it; default: $SLURM_CONF"
    )
    keep = commands.add_parser("keep")  # what `up` starts
    keep.add_argument("folder", type=Path)
    keep.add_argument("nodes", type=int)
    args = parser.parse_args()
    try:
        match args.command:
            case "up":
                _up(args.nodes)
            case "down":
                _down(args.conf)
            case "keep":
                _keep(args.folder, args.nodes)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _up(nodes: int) -> None:
    missing = missing_for_a_cluster()
    if missing:
        raise ClusterError(missing)
    # In memory where that is possible: a slow disk costs the database seconds.
    top = next(place for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK))
    folder = Path(tempfile.mkdtemp(prefix="sl", dir=top))
    with (folder / "log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "slotmamba_slurm.cluster", "keep", str(folder / "c"), str(nodes)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "c" / KEEPER).exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            keeper.kill()
            said = (folder / "log").read_text().strip().removeprefix("error: ")
            raise ClusterError(f"the cluster has not started: {said or 'no answer'} (files: {folder})")
        time.sleep(0.05)
    print(f"export SLURM_CONF={folder / 'c' / 'etc' / 'slurm.conf'}")
    print(f"# {nodes} nodes; partitions normal and preemptible; `python -m slotmamba_slurm.cluster down` ends it")


def _keep(folder: Path, nodes: int) -> None:
    """Holds a cluster until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder.parent.chmod(0o711)
    with SlurmCluster(folder, nodes):
        written = folder / f"{KEEPER}.part"
        written.write_text(f"{os.getpid()} {_started(os.getpid())}\n")
        written.rename(folder / KEEPER)
        while True:
            signal.pause()


def _down(conf: str | None) -> None:
    if conf is None:
        raise ClusterError("which cluster? Give the SLURM_CONF that `up` printed, or set it")
    folder = Path(conf).parent.parent
    try:
        pid, started = map(int, (folder / KEEPER).read_text().split())
    except OSError:
        raise ClusterError(f"{conf} is not of a cluster that `up` has started") from None
    # A number that another process has by now is not ours to end.
    if _started(pid) == started:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + START_SECONDS
        while _started(pid) == started:
            if time.monotonic() > deadline:
                raise ClusterError(f"process {pid}, which holds the cluster, does not end")
            time.sleep(0.05)
    shutil.rmtree(folder.parent)


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


if __name__ == "__main__":
    sys.exit(main())
