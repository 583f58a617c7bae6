"""Back ends: what a plan's layers run on."""
