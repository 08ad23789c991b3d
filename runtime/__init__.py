"""One process, one card: run a stage of a job inside a byte budget. No Ray."""
