"""What a stage did, and what decides its result, as files: written, read, found in git and DVC."""
