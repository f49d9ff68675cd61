"""Starting and ending the daemons of a cluster."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from slotmamba_slurm.cluster.files import CLUSTER, make_nodes, search_path, write_files

PROGRAMS = (
    *("munged", "munge", "slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel"),
    *("sacct", "sacctmgr", "mariadbd", "mariadb", "mariadb-install-db", "setpriv", "unshare"),
)
DEBIAN_PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
LONGEST_FOLDER = 60  # characters: daemons put Unix sockets below it, whose paths end at 108
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class ClusterError(RuntimeError):
    """A daemon ended or did not come up, or a command of Slurm's failed."""


def missing_for_a_cluster() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install {DEBIAN_PACKAGES})"
    if os.geteuid() != 0:
        return "a cluster needs root, for namespaces in which each node has its own host name"
    return None


def outside_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what Slurm sets in a job, which its commands would take for options."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}


class SlurmCluster:
    """A Slurm with accounting in `folder`, which is not there yet: munged, MariaDB, slurmdbd, slurmctld and a slurmd
    for each node.

    The daemons end with `stop`, or with the thread that called `start`, however that ends. Each node is a set of
    namespaces: it has its own host name and process numbers, and shares the files and the network.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        """
        Raises:
            ClusterError: the path of the folder is too long, or something is missing on this machine.
        """
        self.folder = folder
        missing = missing_for_a_cluster()
        if missing:
            raise ClusterError(missing)
        if len(str(folder)) > LONGEST_FOLDER:
            raise ClusterError(f"{folder}: too long a path for Unix sockets, of {LONGEST_FOLDER} characters at most")
        self.nodes = make_nodes(nodes)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to say."""
        return self.folder / "etc" / "slurm.conf"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all daemons and waits until every node is idle: about three seconds.

        Raises:
            ClusterError: a daemon does not come up; nothing is left running.
        """
        write_files(self.folder, self.nodes)
        try:
            self._start_munged()
            self._start_accounting()
            self._start("slurmctld", ["slurmctld", "-D", "-i"])
            self._wait("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False).stdout)
            for node in self.nodes:
                self.start_node(node.name)
            self._wait("the nodes", self._all_idle)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every process of this cluster, jobs included; the folder stays."""
        for node in self.nodes:
            self.kill_node(node.name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is None:
                continue
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def reset(self) -> None:
        """Cancels all jobs, brings back all nodes and waits until every one is idle."""
        for node in self.nodes:
            if node.name not in self._daemons:
                self.start_node(node.name)
        for options in (["--full", "--signal=KILL"], []):
            self.run("scancel", *options, "--user=root", check=False)
        self._wait("an empty queue", lambda: not self.run("squeue", "-h").stdout.strip())
        for node in self.nodes:  # refused for those that are up
            self.run("scontrol", "update", f"nodename={node.name}", "state=resume", check=False)
        self._wait("the nodes", self._all_idle)

    def run(self, *command: str, check: bool = True, seconds: float = 60, **settings: Any) -> Any:
        """Runs a command in the cluster's environment; returns a `subprocess.CompletedProcess` with text.

        Raises:
            ClusterError: `check`, and it did not end with 0.
        """
        done = subprocess.run(
            command,
            env=outside_jobs(os.environ) | {"PATH": search_path(), "SLURM_CONF": str(self.conf)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            **settings,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; nothing for a job that is not known."""
        lines = self.run("scontrol", "-o", "show", "job", number, check=False).stdout.splitlines()
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", lines[0])) if lines else {}

    def wait_for_job(self, number: str, states: tuple[str, ...] = ENDED, seconds: float = 60) -> dict[str, str]:
        """Waits until a job is in one of `states`; returns what `job` says."""
        found: dict[str, str] = {}

        def reached() -> bool:
            found.update(self.job(number))
            return found.get("JobState") in states

        self._wait(f"job {number} to be {' or '.join(states)}", reached, seconds)
        return found

    def wait_for_node(self, name: str, state: str, seconds: float = 60) -> None:
        """Waits until a node is in a state such as idle or down, whether it answers or not."""
        ask = ["sinfo", "-h", "-N", "-p", "normal", "-n", name, "-o", "%T"]
        self._wait(f"{name} to be {state}", lambda: self.run(*ask).stdout.strip().rstrip("*") == state, seconds)

    def process(self, name: str) -> int:
        """The first process in the namespaces of a node."""
        unshare = self._daemons[name].pid
        (child,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return int(child)

    def _start_munged(self) -> None:
        run, socket = self.folder / "run", self.folder / "run" / "munge.sock"
        files = [f"--key-file={self.folder}/etc/munge.key", f"--socket={socket}", f"--pid-file={run}/munged.pid"]
        files += [f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munged.seed"]
        self._start("munged", ["munged", "--foreground", *files])
        self._wait("munged", lambda: self.run("munge", "-n", "-S", str(socket), check=False).returncode == 0)

    def _start_accounting(self) -> None:
        """slurmdbd on a MariaDB that only a Unix socket leads to."""
        socket = self.folder / "run" / "db.sock"
        # A folder for temporary files of each cluster's own: two that are made at once collide otherwise.
        common = ["--no-defaults", "--user=root", f"--datadir={self.folder}/db", f"--tmpdir={self.folder}/dbtmp"]
        common += ["--skip-name-resolve", "--innodb-log-file-size=16M"]
        root_only = ["--auth-root-authentication-method=socket", "--auth-root-socket-user=root"]
        self.run("mariadb-install-db", *common, *root_only, "--skip-test-db")
        small = ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF"]
        required = ["--innodb-lock-wait-timeout=900"]  # slurmdbd says so
        files = [f"--socket={socket}", f"--pid-file={self.folder}/run/mariadbd.pid"]
        self._start("mariadbd", ["mariadbd", *common, *files, *small, *required, "--skip-networking", "--skip-log-bin"])
        ask = ["mariadb", "--no-defaults", f"--socket={socket}", "--user=root", "--execute=select 1"]
        self._wait("mariadbd", lambda: self.run(*ask, check=False).returncode == 0)
        self._start("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(socket))
        clusters = ["sacctmgr", "-n", "-P", "show", "cluster", "format=cluster"]
        self._wait("slurmdbd", lambda: self.run(*clusters, check=False).returncode == 0)
        self.run("sacctmgr", "-i", "add", "cluster", CLUSTER)

    def start_node(self, name: str) -> None:
        """Starts a node, at first or after `kill_node`; it is ready when slurmctld says so."""
        # sh is the first process of the node, which reaps: slurmd leaves the ones it is handed as zombies.
        script = (
            f"mount --bind {self.folder}/etc/hosts /etc/hosts && hostname {name} && {{ slurmd -D -N {name} & wait; }}"
        )
        namespaces = ["--uts", "--pid", "--mount", "--fork", "--kill-child=SIGKILL", "--propagation", "private"]
        self._start(name, ["unshare", *namespaces, "--mount-proc", "sh", "-c", script])

    def kill_node(self, name: str) -> None:
        """Kills all processes of a node at once: slurmd, and those of jobs. Slurm notices it SlurmdTimeout later."""
        # unshare takes the first process of the node with it, and that all others.
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    def _start(self, name: str, command: list[str], **variables: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=outside_jobs(os.environ) | {"PATH": search_path(), "SLURM_CONF": str(self.conf)} | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def _all_idle(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%T", check=False).stdout.split() == ["idle"] * len(
            self.nodes
        )

    def _wait(self, what: str, happened: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} has ended with {describe_end(daemon.returncode)}: {self._tail(name)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:g} seconds for {what}: the logs are in {self.folder / 'log'}")
            time.sleep(0.05)

    def _tail(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.out").read_text(errors="replace")[-1000:]


def describe_end(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
