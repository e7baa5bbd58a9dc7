"""What a device's memory and arithmetic allow, and what share of it a run reached."""
