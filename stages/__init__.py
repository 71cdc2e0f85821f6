"""What DVC runs: six stages, thin files that load, build, loop and save."""
