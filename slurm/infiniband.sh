# NCCL on nodes with InfiniBand. Source it by launcher.setup (docs/gpu-nodes.md), after you have looked at each line.
# A value that is set already stays. NCCL's variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html

# The run ends where InfiniBand cannot be used. Without this line NCCL falls back to TCP, and steps are merely slow.
export NCCL_NET="${NCCL_NET:-IB}"

# Adapters by the beginning of their names (ibstat lists them). Leave out those of storage and management, as in
# "^=mlx5_2": a card with a link that leads to no other node makes NCCL fail or hang.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"

# Where NCCL's ranks first meet over IP, by the beginning of the interface's name (ip -br addr): IP over InfiniBand here.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib}"

# The same for gloo, which dsft sends its own messages over and which wants the interface's whole name:
# https://docs.pytorch.org/docs/stable/distributed.html
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}"

# Only on very large networks, where NCCL reports ibv_poll_cq with error 12: 4.096 us * 2^22, about 17 s a try.
# export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
