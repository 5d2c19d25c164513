"""Sources of images: folders, timm's data sets, streams, windows, pages, the demo data set lies in `data/demo`."""
