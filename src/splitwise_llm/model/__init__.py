"""Split transformer arithmetic: families, shard loading, KV cache, kernels. No networks, no policies."""

import os

# Weights in huge pages: reading them all for every token otherwise fills the processor's page tables (4 % here).
# torch reads this once, before its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
