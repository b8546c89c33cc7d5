"""What carving costs: measured, tabulated and drawn."""
