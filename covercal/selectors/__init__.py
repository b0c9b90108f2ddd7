"""Ways to choose calibration samples, one file each."""
