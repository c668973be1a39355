"""Split transformer arithmetic: families, shard loading, KV cache, kernels. No networks, no policies."""
