"""Sources of images: folders, timm's data sets, streams, windows, pages, the embedded data set."""
