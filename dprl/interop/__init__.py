"""What dprl shares with other projects: their parameter names, and with them their checkpoints."""
