"""Drawn DICOM files."""

from pathlib import Path
from typing import Any

import numpy as np


def draw(path: Path, x: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 12, **tags: Any) -> Path:
    """Writes grey `[H, W]` or `[frames, H, W]`, uint16 or int16, as an X-ray image."""
    import pydicom
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "DX", photometric, 1
    ds.Rows, ds.Columns = x.shape[-2:]
    if x.ndim == 3:
        ds.NumberOfFrames = len(x)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(x.dtype.kind == "i")
    ds.PixelData = x.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path
