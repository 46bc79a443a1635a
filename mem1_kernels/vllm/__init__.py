"""vLLM with contexts that are pruned in place."""
