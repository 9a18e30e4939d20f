"""The `surgery` command: one page per subcommand, assembled in `surgery.scripts.cli`."""
