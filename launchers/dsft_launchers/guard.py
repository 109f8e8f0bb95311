"""python -m dsft_launchers.guard JOB NODE: a step beside the ranks of an elastic job; its batch step runs on NODE.

SLURM leaves a job that may lose nodes running when it loses the first one, whose batch step is then gone. The guard, on
another node, puts the job back into the queue.
"""

import signal
import sys
import time

from dsft_launchers import cluster
from dsft_launchers.codes import DONE
from dsft_launchers.join import expand_hosts

POLL_S, PATIENCE_S = 15.0, 300.0
"""How often SLURM is asked; how long it may refuse before a job that holds nodes for nothing is cancelled."""


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
                print(f"dsft: {time.strftime('%FT%T')} {node} was lost with the batch step: into the queue", flush=True)
                refused_since = refused_since or time.monotonic()
                idle = time.monotonic() - refused_since > PATIENCE_S
                cluster.ask(*(["scancel"] if idle else ["scontrol", "requeue"]), job_id)
                return DONE
        except cluster.ClusterError as error:
            print(f"dsft: {time.strftime('%FT%T')} SLURM says: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
