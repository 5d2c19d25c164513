"""Sources of images: folders, timm's data sets, streams, windows and pages. The demo data set is in `data/demo`."""
