# NCCL on AWS with EFA (p4d, p5 and later). Source it by launcher.setup (docs/gpu-nodes.md), after you have looked at
# each line. A value that is set already stays. The plugin aws-ofi-nccl must be found: its folder on LD_LIBRARY_PATH.
# What which version needs: https://github.com/aws/aws-ofi-nccl/blob/master/doc/efa-env-var.md

# The run ends where the plugin is not found or finds no EFA. Without this line NCCL falls back to TCP, many times
# slower. Older plugins call themselves "AWS Libfabric"; with NCCL_DEBUG=INFO NCCL's log shows the name.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-net
export NCCL_NET="${NCCL_NET:-Libfabric}"

# Processes that a run starts (to read its result back, of a data set) fork, which fails where huge pages have run out.
export FI_EFA_USE_HUGE_PAGE="${FI_EFA_USE_HUGE_PAGE:-0}"

# Only for libfabric before 1.18 or aws-ofi-nccl before 1.7: newer ones use RDMA by themselves.
# export FI_EFA_USE_DEVICE_RDMA="${FI_EFA_USE_DEVICE_RDMA:-1}"

# Where ranks first meet over IP: any interface that reaches the other nodes, so none of a container.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,veth}"
