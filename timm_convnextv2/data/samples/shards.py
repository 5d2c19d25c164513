"""How the shards of a stream are divided among processes and their data workers."""

from ..sources.stream import TimmStream


def shards_of(source: TimmStream) -> int | None:
    """Number of files of a stream; None if it is unknown before reading."""
    reader = source.reader
    if source.kind == "wds":
        return len(reader.split_info.filenames)
    if source.kind == "hfids" and not reader.download:
        files = getattr(reader.builder.config, "data_files", None)
        return len(files[reader.split]) if files and reader.split in files else None
    return None


def shard_note(source: TimmStream, workers: int, processes: int) -> str:
    """A warning if an epoch will not have each image exactly once; '' if it will, or if that is unknown.

    timm gives whole shards to data workers, and each makes the same number of whole batches: one with fewer images
    starts its shards again, one with more skips some. Call it after `set_loader_cfg`; `workers` is per process.
    """
    shards, each = shards_of(source), max(1, workers)
    if shards is None:
        return ""
    readers = processes * each
    # if shards do not divide among processes, datasets lets every process read all of them and keep its share of images
    sharing = each if source.kind == "hfids" and shards % processes else readers
    if shards % sharing:
        return (
            f"{shards} shards do not divide evenly among {sharing} data workers ({processes} processes x {each}): an "
            "epoch repeats some images and skips others, the next epoch other ones. Choose other --workers."
        )
    images, made = source.reader.num_samples, len(source) * processes
    if made == images:
        return ""
    return (
        f"An epoch takes {made} images of {images}, because each of {readers} data workers makes whole batches: "
        f"{made - images} {'is' if made - images == 1 else 'are'} repeated."
    )
