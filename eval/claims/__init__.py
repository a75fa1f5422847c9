"""The paper's claims, measured on the data that `python -m eval study` has sampled for finished runs."""
