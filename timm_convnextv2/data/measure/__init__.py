"""Measurements of a data set: pixel statistics, corrupt and duplicate files."""
