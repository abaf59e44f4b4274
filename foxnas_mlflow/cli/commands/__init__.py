"""One module a subcommand: `SUMMARY`, `PARAMETERS` and `run`, light to import."""
