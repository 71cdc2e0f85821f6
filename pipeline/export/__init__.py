"""A trained model for others: a folder with its card, or a repository of the hub."""
