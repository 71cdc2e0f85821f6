"""GPT-2: the network, its initial weights, its loss, its directory on disk."""
