"""The report of a run: what its folder holds, as charts, images and one HTML page."""
