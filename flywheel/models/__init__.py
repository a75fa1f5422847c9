"""How models are loaded, served, prompted and scored."""
