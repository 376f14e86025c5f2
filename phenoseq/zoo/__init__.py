"""The zoo: models by name, with their weights and cards."""
