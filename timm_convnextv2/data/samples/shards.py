"""How the shards of a stream divide among processes and their data workers."""

from ..sources.stream import TimmStream


def shards_of(source: TimmStream) -> int | None:
    """Number of files that a stream is read from; None where that is not known before it is read."""
    reader = source.reader
    if source.kind == "wds":
        return len(reader.split_info.filenames)
    if source.kind == "hfids" and not reader.download:
        files = getattr(reader.builder.config, "data_files", None)
        return len(files[reader.split]) if files and reader.split in files else None
    return None


def shard_note(source: TimmStream, workers: int, processes: int) -> str:
    """What to say where an epoch cannot have each image once; '' where it can, as far as that is known.

    timm gives whole shards to data workers, and has each of them make the same number of whole batches: a worker with
    fewer images begins its shards again, and one with more leaves some out.

    Args:
        source: After `set_loader_cfg`.
        workers: Data workers of a process; 0: the process itself.
        processes: Of the run.
    """
    shards, each = shards_of(source), max(1, workers)
    if shards is None:
        return ""
    readers = processes * each
    # datasets lets every process read all shards, and keep its share of the images, where processes cannot divide them
    sharing = each if source.kind == "hfids" and shards % processes else readers
    if shards % sharing:
        return (
            f"{shards} shards do not divide evenly among {sharing} data workers ({processes} processes x {each}): in "
            "an epoch some images come twice and others not at all, in the next one other images. Choose --workers so "
            "that they do."
        )
    images, made = source.reader.num_samples, len(source) * processes
    if made != images:
        return (
            f"An epoch takes {made} images of {images}, as each of {readers} data workers makes whole batches: "
            f"{made - images} come twice."
        )
    return ""
