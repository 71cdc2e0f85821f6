"""The shared GPT-2 core: each module owns one noun. Nothing here prints or acts on import."""
