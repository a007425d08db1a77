"""The machine's part: command line, files, downloads, device and processes, metrics. It imports nothing from above."""
