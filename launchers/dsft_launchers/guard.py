"""python -m dsft_launchers.guard JOB NODE: a step beside the ranks of an elastic job; its batch step runs on NODE.

SLURM leaves a job that may lose nodes running when it loses the first one, whose batch step is then gone. The guard, on
another node, puts the job back into the queue.
"""

import signal
import sys
import time

from dsft_launchers import cluster
from dsft_launchers.attempt import tell
from dsft_launchers.codes import DONE
from dsft_launchers.join import expand_hosts
from dsft_launchers.supervise import PATIENCE_S

POLL_S = 15.0


def main() -> int:
    """Watch until the job ends, or its batch step is lost."""
    job_id, node = sys.argv[1:]
    refused_since = None
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a notice is for the ranks
    while True:
        time.sleep(POLL_S)
        try:
            job = cluster.job(job_id)
            if job is None or job.over:
                return DONE
            if job.state == "RUNNING" and node not in expand_hosts(job.nodes):
                tell(f"{node} was lost with the batch step: into the queue")
                refused_since = refused_since or time.monotonic()
                idle = time.monotonic() - refused_since > PATIENCE_S  # it holds nodes for nothing
                cluster.ask(*(["scancel"] if idle else ["scontrol", "requeue"]), job_id)
                return DONE
        except cluster.ClusterError as error:
            tell(f"SLURM says: {error}")


if __name__ == "__main__":
    sys.exit(main())
