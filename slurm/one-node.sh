# NCCL on one node whose GPUs are joined by NVLink. NCCL's own choices are right there; these lines keep it off the
# network. Source it by launcher.setup (docs/gpu-nodes.md). A value that is set already stays.
# NCCL's variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# No adapter is opened: a broken one cannot hold up a run that needs none.
export NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-1}"

# Ranks meet on the loopback interface, which nobody else reaches. dsft's launcher=local sets both by itself.
# gloo's: https://docs.pytorch.org/docs/stable/distributed.html
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"

# Only where NCCL's start fails for want of NVLink SHARP's resources, as in a container or with other jobs on the node.
# export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# Only to find an error: without peer-to-peer copies a run that failed or hung with them goes on, slower. Then look at
# nvidia-smi topo -p2p n and at PCI's access control (ACS):
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
# export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}"
