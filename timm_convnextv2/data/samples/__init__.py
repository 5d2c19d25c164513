"""From a source's images to training batches: dataset, transform, order."""
