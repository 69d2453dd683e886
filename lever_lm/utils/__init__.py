"""What every package uses and no domain owns: errors, files, locks, safe parsing, processes, progress, the hub."""
