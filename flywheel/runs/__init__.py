"""A run on disk and the processes that fill it: files, shards, manifests, ranks, the loop."""
