# NCCL on nodes with RDMA over Ethernet (RoCE v2). Source it by launcher.setup (docs/gpu-nodes.md), after you have looked
# at each line. A value that is set already stays.
# NCCL's variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# The run ends where RDMA cannot be used. Without this line NCCL falls back to TCP, and steps are merely slow.
export NCCL_NET="${NCCL_NET:-IB}"

# Adapters by the beginning of their names (ibstat lists them, with link layer Ethernet).
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"

# Since 2.21 NCCL finds the address (GID) for RoCE v2 over IPv4 by itself; on a network of IPv6 it has to be told.
# An older NCCL needs the number that show_gids prints: NCCL_IB_GID_INDEX, the same on all nodes.
# export NCCL_IB_ADDR_FAMILY="${NCCL_IB_ADDR_FAMILY:-AF_INET6}"

# The traffic class that the switches keep lossless: DSCP * 4. Yours is the network team's number; with a wrong one
# packets are dropped under load, and the run is slow or ends. 104 is DSCP 26, which many guides of vendors take.
export NCCL_IB_TC="${NCCL_IB_TC:-104}"

# Where ranks first meet over IP, by name (ip -br addr); gloo's is the whole name of one:
# https://docs.pytorch.org/docs/stable/distributed.html
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-eth}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-eth0}"
