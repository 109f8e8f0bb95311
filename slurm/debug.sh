# What NCCL and torch say of themselves, into RUN/logs/rank-<r>.log. For a run that does not begin, hangs or is slow;
# not to be kept: NVIDIA warns of debugging variables in production. Source it by launcher.setup (docs/gpu-nodes.md).
# NCCL's variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# Which NCCL, which interfaces and adapters, which transport between which ranks (P2P, SHM, NET/IB/GDRDMA, NET/Socket).
export NCCL_DEBUG="${NCCL_DEBUG:-INFO}"
export NCCL_DEBUG_SUBSYS="${NCCL_DEBUG_SUBSYS:-INIT,BOOTSTRAP,ENV,NET,GRAPH}"

# torch's process groups: what each collective was called with where ranks do not agree.
# https://docs.pytorch.org/docs/stable/distributed.html
export TORCH_DISTRIBUTED_DEBUG="${TORCH_DISTRIBUTED_DEBUG:-INFO}"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-INFO}"

# The PCI and NVLink map as NCCL sees it, one file: give it to whoever runs the cluster.
# export NCCL_TOPO_DUMP_FILE="${NCCL_TOPO_DUMP_FILE:-$PWD/nccl-topology.xml}"
