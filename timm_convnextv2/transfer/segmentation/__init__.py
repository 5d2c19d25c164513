"""Semantic segmentation: masks, segmenter, sliding window, metrics."""
