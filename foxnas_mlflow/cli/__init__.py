"""Layer 3: one subcommand an MLproject entry point."""
