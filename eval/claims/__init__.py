"""The paper's claims, measured on what `python -m eval study` has drawn of finished runs."""
