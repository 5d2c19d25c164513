"""The commands, one file each: options, help and output. Nothing else parses command lines or prints."""
