"""The loop around the kernels: tags, environments, retrieval, scoring and the agent itself."""
