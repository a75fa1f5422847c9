"""A run on disk and the processes that write it: files, shards, manifests, ranks, the loop."""
