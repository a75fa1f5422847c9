"""LoRA trainings of the three roles, on TRL and accelerate."""
