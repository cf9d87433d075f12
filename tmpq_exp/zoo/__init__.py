"""Float models: embedded ones with their weights, training recipes and model cards."""
