"""From a source's images to training batches: transform, order, loader."""
