"""Child processes: how a program is found and started, and how its end is noticed, signalled and reaped."""
