"""flywheel: makes a small language model better at questions whose answers can be checked, round after round."""

__version__ = "0.1.0"
