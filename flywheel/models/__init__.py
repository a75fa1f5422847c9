"""Adapters to the libraries that run a model. `base` is the contract."""
