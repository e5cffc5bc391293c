"""Generation: attention over caches of unequal length, shortening a cache, a causal model with its cache inside."""
