"""What everything runs on: processes, devices, random numbers, files, signals, the console."""
