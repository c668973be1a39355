"""Execution of plans between real machines; it refuses to know policies, the simulator and the web."""
