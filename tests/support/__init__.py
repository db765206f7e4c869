"""What several test files share: stand-ins, clients, files, models and processes."""
