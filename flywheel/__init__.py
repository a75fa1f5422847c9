"""flywheel: compute-optimal search, verified harvest, distillation, and round again."""

__version__ = "0.1.0"
