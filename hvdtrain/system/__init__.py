"""The machine: processes, files, signals, network, time limits."""
